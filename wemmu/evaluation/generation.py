"""Generates the images of a benchmark and keeps them: resumable, and split over ranks.

FOLDER/settings.json   what the images depend on; other settings need another folder
FOLDER/requests.jsonl  key, text, seed, category and unit of every request
FOLDER/inputs/         input images, KEY_N.png
FOLDER/images/         generated images, KEY.png, written by rename; what the model said is in the text chunk `words`
"""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from wemmu.config.base import differences
from wemmu.config.files import replace_text, replacing
from wemmu.evaluation.benchmark import BenchmarkError, BenchmarkRequest, Judged, open_image
from wemmu.heartbeat import beat
from wemmu.jsonlines import write_lines
from wemmu.locks import EXCLUSIVE, SHARED, Holder, hold, lease_s
from wemmu.pixels import fitted, on_canvas
from wemmu.sampling.request import GenerationRequest, Response

SETTINGS, REQUESTS, INPUTS, IMAGES = "settings.json", "requests.jsonl", "inputs", "images"
# Seconds until a rank gives up on the others: as the launcher's default for a rank that hangs.
PATIENCE_S = 1800.0
WORDS = "words"
# Answers requests that have one task, number of inputs and size.
Draw = Callable[[Sequence[BenchmarkRequest]], list[Response]]


@contextmanager
def prepared(
    folder: Path, requests: Sequence[BenchmarkRequest], settings: Mapping[str, Any], replace: bool = False
) -> Iterator[None]:
    """Write the settings and the requests, and keep them until the block ends; all ranks may call it.

    replace: whether images of other settings are deleted; the first rank does it, the others find its settings.

    Raises:
        BenchmarkError: if the folder holds images of other settings or of other requests.
        LockedError: if another process works with images that this one would delete.
    """
    settings = json.loads(json.dumps(settings))
    keys = [request.key for request in requests]
    if not keys:
        raise BenchmarkError(f"{folder}: the benchmark's files and options name no image to score")
    if twice := [key for key, number in Counter(keys).items() if number > 1]:
        raise BenchmarkError(f"{twice[0]} names several images of the benchmark; give each a name of its own")
    if unsafe := [key for key in keys if "/" in key or "\0" in key]:
        raise BenchmarkError(f"the benchmark names an image {unsafe[0]!r}, which is not a valid file name")
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as until_the_end:
        with hold(folder / ".lock", lambda _: f"another process prepares {folder}", patience_s=PATIENCE_S):
            _prepare(folder, requests, settings, replace)
            until_the_end.enter_context(_in_use(folder, SHARED))
        yield


def _in_use(folder: Path, kind: int) -> AbstractContextManager[int]:
    """Lock the images: SHARED to write and read them, EXCLUSIVE to delete them."""

    def busy(_: Holder) -> str:
        return f"another process works with images of other settings in {folder}; wait for it to end"

    return hold(folder / ".in-use", busy, kind, lease_s())


def _prepare(folder: Path, requests: Sequence[BenchmarkRequest], settings: Any, replace: bool) -> None:
    file = folder / SETTINGS
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        changes = [f"{name} was {a!r} and is {b!r}" for name, a, b in differences(before, settings)]
        if changes and replace:
            with _in_use(folder, EXCLUSIVE):
                for name in (INPUTS, IMAGES):
                    shutil.rmtree(folder / name, ignore_errors=True)
        elif changes:
            raise BenchmarkError(
                f"{folder} holds images of other settings ({'; '.join(changes[:4])}); give another --out, or --replace "
                "them"
            )
    for name in (INPUTS, IMAGES):
        (folder / name).mkdir(parents=True, exist_ok=True)
    lines = [
        {"key": r.key, "text": r.text, "seed": r.seed, "category": r.category, "unit": r.unit, "inputs": len(r.images)}
        for r in requests
    ]
    write_lines(folder / REQUESTS, lines)
    replace_text(file, json.dumps(settings, indent=1))


def generate(folder: Path, batches: Sequence[Sequence[BenchmarkRequest]], draw: Draw) -> None:
    """Generate the images of these batches."""
    begun, done, total = time.monotonic(), 0, sum(map(len, batches))
    for several in batches:
        for request, response in zip(several, draw(several), strict=True):
            _save_inputs(folder, request)
            _save(response.image, folder / IMAGES / f"{request.key}.png", response.words)
        beat()
        done += len(several)
        left = (time.monotonic() - begun) / done * (total - done)
        print(f"generated {done}/{total} ({several[0].category}), {left / 60:.1f} min left", flush=True)


def missing(folder: Path, requests: Sequence[BenchmarkRequest]) -> list[BenchmarkRequest]:
    """Return the requests without an image."""
    return [request for request in requests if not (folder / IMAGES / f"{request.key}.png").is_file()]


def wait_for_others(folder: Path, requests: Sequence[BenchmarkRequest]) -> None:
    """Return when the other ranks have generated their images.

    Raises:
        BenchmarkError: if no image came for a long time.
    """
    lacking, since = len(missing(folder, requests)), time.monotonic()
    while lacking:
        if time.monotonic() - since > PATIENCE_S:
            raise BenchmarkError(f"{folder / IMAGES} lacks {lacking} images, and no other rank writes any")
        time.sleep(1.0)
        beat()
        if (now := len(missing(folder, requests))) < lacking:
            lacking, since = now, time.monotonic()


def adopt(folder: Path, requests: Sequence[BenchmarkRequest], files: Mapping[str, Path]) -> None:
    """Copy images that another program generated, key -> file, to where generated ones are."""
    for request in missing(folder, requests):
        _save_inputs(folder, request)
        file = files[request.key]
        _save(open_image(file, file.read_bytes()), folder / IMAGES / f"{request.key}.png")


def load(folder: Path, requests: Sequence[BenchmarkRequest]) -> Iterator[Judged]:
    """Yield each request with its generated image and words.

    Raises:
        BenchmarkError: if images are missing.
    """
    if lacking := missing(folder, requests):
        raise BenchmarkError(
            f"{folder / IMAGES} lacks {len(lacking)} of {len(requests)} images, the first is {lacking[0].key}.png; "
            "generate them first: the same command without --only score continues"
        )
    for request in requests:
        with Image.open(folder / IMAGES / f"{request.key}.png") as image:
            yield Judged(request, image.convert("RGB"), image.info.get(WORDS, ""))


def in_batches(requests: Sequence[BenchmarkRequest], size: int) -> list[list[BenchmarkRequest]]:
    """Group requests by task, category, number of inputs and size of the image.

    Rounding depends on what else is in a batch. So ranks share batches, and a batch that lacks an image is generated
    again as a whole: the images are those of one process that nobody interrupted.
    """
    groups: dict[Any, list[BenchmarkRequest]] = {}
    for request in requests:
        kind = request.task, request.category, len(request.images), request.size
        groups.setdefault(kind, []).append(request)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


def request_of(
    requests: Sequence[BenchmarkRequest], size: tuple[int, int], own: Sequence[Sequence[tuple[int, int]]] = ()
) -> GenerationRequest:
    """Return a batch for a recipe. size: (height, width) of the new images; own: of the inputs, by default `size`."""
    own = own or [[size] * len(request.images) for request in requests]
    inputs = [[*map(fitted, request.images, sizes)] for request, sizes in zip(requests, own, strict=True)]
    images, sizes = on_canvas(inputs, size)
    seeds = torch.tensor([request.seed for request in requests])
    texts = [request.text for request in requests]
    return GenerationRequest(requests[0].task, texts, images, size, seeds, sizes=sizes)


def _save_inputs(folder: Path, request: BenchmarkRequest) -> None:
    for number, image in enumerate(request.images):
        _save(image, folder / INPUTS / f"{request.key}_{number}.png")


def _save(image: Image.Image, file: Path, words: str = "") -> None:
    facts = PngInfo()
    if words:
        facts.add_itxt(WORDS, words)
    with replacing(file) as aside:
        image.save(aside, "PNG", pnginfo=facts)
