"""What a request asks of a model, and its checks."""

from dataclasses import dataclass

from PIL import Image
from pydantic import ValidationError

from wemmu.command_line import UsageError
from wemmu.config import Task
from wemmu.config.buckets import Size
from wemmu.config.schema import Sampling


@dataclass(frozen=True)
class SampleOptions:
    """What to generate: `count` images of `size` = (height, width) px; None: as the first input image, or square.

    Image i uses seed + i. steps, guidance, image_guidance, solver: None for the model's default.
    """

    prompt: str
    images: tuple[Image.Image, ...]
    size: tuple[int, int] | None
    seed: int
    count: int
    steps: int | None
    guidance: float | None
    image_guidance: float | None
    solver: str | None = None

    @property
    def input_sizes(self) -> list[Size]:
        """(height, width) px of the input images."""
        return [(image.height, image.width) for image in self.images]

    def check(self, draws: bool) -> None:
        """Raise UsageError for a question without an image. draws: see `Source`."""
        if not draws and not self.images:
            raise UsageError("a question needs an image; give one")

    def check_used(self, draws: bool) -> None:
        """Raise UsageError for an option that this request does not use."""
        drawing = ("steps", "solver", "guidance", "image_guidance")
        if not draws and (unused := [name for name in drawing if getattr(self, name) is not None]):
            option = unused[0].replace("_", "-")
            raise UsageError(f"--{option} is for a model that draws; this one answers questions about an image")
        if self.image_guidance is not None and len(self.images) != 1:
            raise UsageError(f"--image-guidance is for a request with one --image; {len(self.images)} were given")
        if self.image_guidance is not None and self.guidance is not None and not self.prompt:
            raise UsageError("without --prompt, --guidance and --image-guidance are the same weight; give one of them")
        if self.guidance is not None and not (self.images or self.prompt):
            raise UsageError("--guidance has nothing to weight; give --prompt, --image or both")

    def weights(self, task: Task) -> dict[str, float]:
        """Return guidance weights under the names of `Sampling`; `guidance` weights the text, if the task has text."""
        name = {Task.EDIT: "instruction", Task.RECONSTRUCTION: "image", Task.MULTI_EDIT: "multi"}.get(task, "t2i")
        given = [("image", self.image_guidance), (name, self.guidance)]
        return {key: value for key, value in given if value is not None}

    def sampling(self, task: Task, default: Sampling) -> Sampling:
        """Return the settings of a model with the changes of these options; the images' own seeds key the noise."""
        changes = {"steps": self.steps, "solver": self.solver, **self.weights(task)}
        given = {name: value for name, value in changes.items() if value is not None}
        try:
            return Sampling(**default.model_dump() | given | {"seed": 0})
        except ValidationError as error:
            first = error.errors()[0]
            name = "guidance" if first["loc"][0] in self.weights(task) else first["loc"][0]
            raise UsageError(f"{name} is {first['input']}: {first['msg'].lower()}") from error
