"""What a reader finds in a folder of another framework: parameters by name, whose values are read one at a time."""

from dataclasses import dataclass

from tools.export.stored import Stored
from wemmu.checkpoint.store import MOMENTS, WEIGHTS


class FolderError(ValueError):
    """A folder that cannot be read; the message names the file, the reason and the remedy."""


@dataclass(frozen=True)
class Parameter:
    """parts: the weight and, if it was trained by Adam, its moments, by the first words of their names in a checkpoint.

    They are read in float32, their dtype is that in the folder; narrower types are converted exactly.
    """

    trained: bool
    parts: dict[str, Stored]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[WEIGHTS].shape


@dataclass(frozen=True)
class Folder:
    """made_by: engine, ranks and version, for people. step: of the optimizer. parameters: by the names of the user's
    module; frozen ones are there unless they were left out when it was saved.
    """

    made_by: str
    step: int
    parameters: dict[str, Parameter]

    @property
    def has_moments(self) -> bool:
        """Whether Adam's moments are there for all that was trained, so that training can go on."""
        trained = [each for each in self.parameters.values() if each.trained]
        return bool(trained) and all(set(MOMENTS) <= each.parts.keys() for each in trained)
