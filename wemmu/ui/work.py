"""Runs a request of the page, from its fields to images, and yields its progress."""

import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

from PIL import Image

from wemmu.command_line import UsageError, exit_code
from wemmu.images import fit, to_rgb
from wemmu.sampling.request import Response
from wemmu.shapes.verdict import Verdict, verdict
from wemmu.shapes.vocabulary import WORLD
from wemmu.source import SampleOptions, Source
from wemmu.ui.models import Models

MAX_IMAGES = 4
# Seconds between two looks at images that are not finished; each decodes them.
EVERY = 0.3


@dataclass(frozen=True)
class Result:
    """One image of a model, finished or not. settings: of a finished one, for its metadata."""

    model: str
    seed: int
    image: Image.Image
    words: str = ""
    verdict: Verdict | None = None
    settings: dict[str, Any] | None = None


@dataclass(frozen=True)
class State:
    """What the page shows. progress: the model that works and its share; error, notes: sentences."""

    results: Sequence[Result] = ()
    progress: str = ""
    share: float = 0.0
    error: str = ""
    notes: Sequence[str] = ()


class _Stopped(Exception):
    pass


def run(models: Models, names: Sequence[str], options: SampleOptions) -> Iterator[State]:
    """Yield states until all models have responded or one fails. Closing the iterator stops the model."""
    results: list[Result] = []
    notes: dict[str, None] = {}
    try:
        _check(names, options)
        for name in [name for name in models.folders if name in names]:
            yield State(tuple(results), f"{name}: loading", 0.0, notes=tuple(notes))
            source = models.open(name)
            notes |= dict.fromkeys(source.warnings(options)) if source.draws else {}
            steps = options.steps or source.sampling.steps
            for update in _watched(source, options):
                if isinstance(update, tuple):
                    step, images = update
                    unfinished = [Result(name, options.seed + i, image) for i, image in enumerate(images)]
                    said = f"{name}: step {step + 1} of {steps}"
                    yield State((*results, *unfinished), said, (step + 1) / steps, notes=tuple(notes))
                else:
                    results += _results(name, source, options, update)
        yield State(tuple(results), notes=tuple(notes))
    except Exception as error:
        yield State(tuple(results), error=sentence(error), notes=tuple(notes))


def sentence(error: Exception) -> str:
    """Return what to show for an error; the traceback of a bug goes to the terminal."""
    if exit_code(error) is None:
        traceback.print_exception(error)
        return f"This is a bug of the program ({type(error).__name__}: {error}). The terminal shows where."
    words = str(error)
    return words[:1].upper() + words[1:] + ("" if words.endswith((".", "!", "?")) else ".")


def read_image(path: Path) -> Image.Image:
    """Read an input image as `wemmu sample` does; raise UsageError if it is not an image."""
    from wemmu.pixels import as_image

    try:
        return to_rgb(as_image(path))
    except ValueError as error:
        # Not the folder of the server in which the upload is.
        raise UsageError(str(error).replace(str(path), path.name)) from error


def _check(names: Sequence[str], options: SampleOptions) -> None:
    if not names:
        raise UsageError("no stage is chosen; choose one under Settings")
    if len(options.images) > MAX_IMAGES:
        raise UsageError(f"{len(options.images)} input images were given; the page takes up to {MAX_IMAGES}")
    if len(options.images) > 1 and not options.prompt:
        raise UsageError(f"{len(options.images)} input images were given without words; say what to do with them")


def _watched(source: Source, options: SampleOptions) -> Iterator[tuple[int, list[Image.Image]] | list[Response]]:
    """Yield (step, images so far) while the model works in a thread of its own, and at last its responses."""
    options.check(source.draws)
    updates: SimpleQueue[tuple[int, list[Image.Image]] | list[Response] | Exception] = SimpleQueue()
    closed, last = Event(), 0.0

    def on_images(step: int, decode: Any) -> None:
        nonlocal last
        if closed.is_set():
            raise _Stopped
        if time.monotonic() - last > EVERY:
            updates.put((step, decode()))
            last = time.monotonic()

    def work() -> None:
        try:
            updates.put(source.respond(options, on_images))
        except Exception as error:
            updates.put(error)

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            update = updates.get()
            if isinstance(update, Exception):
                raise update
            yield update
            if isinstance(update, list):
                return
    finally:
        closed.set()
        thread.join()


def _results(name: str, source: Source, options: SampleOptions, responses: Sequence[Response]) -> Iterator[Result]:
    size, _ = source.sizes_of(options)
    inputs = [fit(image, *size) for image in options.images]
    for i, response in enumerate(responses):
        judged = None
        if source.world == WORLD and (source.draws or response.restored):
            judged = verdict(response.image, options.prompt if source.draws else "", inputs)
        yield Result(name, options.seed + i, response.image, response.words, judged, source.settings(options, i))
