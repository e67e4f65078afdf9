"""An opened model, whatever it was opened from."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wemmu.config import Task
from wemmu.config.buckets import RequestSizes, Size, cropped
from wemmu.config.schema import Sampling
from wemmu.revision import revision
from wemmu.source.options import SampleOptions

if TYPE_CHECKING:
    from wemmu.sampling.request import OnImages, Response


@dataclass(frozen=True)
class Source:
    """An opened model.

    name: for people. origin: stage and step of the weights. resolution: px of its images unless another size is asked
    for; resolutions: px of all stages. sampling: its defaults. draws: whether it makes images of prompts, else it
    answers about images. does: what it does, for people. question: what a VLM is asked if nothing is asked. respond:
    one response for each of the `count` seeds of options that passed `check`. sizes: how it sizes images; None: inputs
    are cropped to the size of the output.
    """

    name: str
    origin: Mapping[str, Any]
    world: str | None
    resolution: int
    resolutions: Sequence[int]
    sampling: Sampling
    draws: bool
    does: str
    respond: "Callable[[SampleOptions, OnImages | None], list[Response]]"
    question: str = ""
    sizes: RequestSizes | None = None

    def sizes_of(self, options: SampleOptions) -> tuple[Size, list[Size]]:
        """Return (height, width) px of the output and of each input image."""
        if self.sizes:
            return self.sizes.of(options.input_sizes, options.size)
        size = options.size or (self.resolution, self.resolution)
        return size, [size] * len(options.images)

    def warnings(self, options: SampleOptions) -> Iterator[str]:
        """Yield a warning for each property of the options that training did not cover."""
        from wemmu.pipeline import beyond

        size, own = self.sizes_of(options)
        yield from beyond(self.world, self.resolutions, [options.prompt], size)
        yield from cropped(options.input_sizes, own)

    def settings(self, options: SampleOptions, number: int = 0) -> dict[str, Any]:
        """Return all that makes image `number` again, for its metadata."""
        from wemmu.sampling.guidance import guidance_weights
        from wemmu.sampling.request import task_of

        task = task_of(options.prompt, len(options.images)) if self.draws else Task.UNDERSTANDING
        sampling, commit = options.sampling(task, self.sampling), revision()
        weights = guidance_weights(task, sampling) if self.draws else {}
        return {
            "model": self.name,
            **self.origin,
            "commit": commit.commit if commit else None,
            "task": str(task),
            "prompt": options.prompt,
            "inputs": [hashlib.sha256(image.tobytes()).hexdigest() for image in options.images],
            "size": list(self.sizes_of(options)[0]),
            "seed": options.seed + number,
            "steps": sampling.steps,
            "solver": sampling.solver,
            "guidance": {branch.name.lower(): weight for branch, weight in weights.items()},
        }
