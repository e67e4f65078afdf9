"""Requests to a model and its responses."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from wemmu.config.buckets import RequestSizes, Size
from wemmu.config.task import Task
from wemmu.pixels import fitted, on_canvas
from wemmu.types import Sizes

# Called after each solver step with its index and a function that decodes the images as they are so far.
OnImages = Callable[[int, Callable[[], list[Image.Image]]], None]


@dataclass(frozen=True)
class GenerationRequest:
    """A batch of one task and one shape.

    texts: B prompts or questions. images: uint8 [B, N, 3, H, W], N = 0 without input. size: (height, width) px of the
    images to make, multiples of the autoencoder's and not smaller than a VLM token. sample_ids: int64 [B], key of the
    noise. negatives: B texts that the guidance leads away from; none stands for empty ones, as in training. sizes: of
    the input images, see `wemmu.types.Batch`.
    """

    task: Task
    texts: Sequence[str]
    images: Tensor
    size: tuple[int, int]
    sample_ids: Tensor
    negatives: Sequence[str] = ()
    sizes: Sizes | None = None


@dataclass(frozen=True)
class Response:
    """The answer to one sample of a request: an image and words.

    restored: whether the image is the input made again. A VLM that only answers returns the input itself.
    """

    image: Image.Image
    words: str = ""
    restored: bool = False


def request_sizes(side: int, max_aspect: float, table: int, token_px: int, latent_px: int) -> RequestSizes:
    """Return how a model sizes images; side, max_aspect: see `RequestSizes`.

    table: side of the position table, tokens. token_px, latent_px: side of a VLM token and of a latent, px.
    """
    # `token_grid` rounds up to half a token down, and half a token to the even number.
    largest = ((2 * table + 1) * token_px - table % 2) // 2
    return RequestSizes(side, latent_px, max_aspect, largest // latent_px * latent_px)


def task_of(text: str, images: int) -> Task:
    """Return the task of a free request by its text and images."""
    if images == 0:
        return Task.T2I if text else Task.UNCONDITIONAL
    if images == 1:
        return Task.EDIT if text else Task.RECONSTRUCTION
    return Task.MULTI_EDIT


def grouped(
    texts: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    sizes: Sequence[tuple[Size, Sequence[Size]]],
    sample_ids: Tensor,
    negatives: Sequence[str] = (),
) -> Iterator[tuple[list[int], GenerationRequest]]:
    """Yield batches of free requests in the order of their first ones, each with the places of its requests.

    images: input images of each request. sizes: of each, the new image's and the inputs' (`RequestSizes.of`).
    sample_ids, negatives: as in `GenerationRequest`.
    """
    groups: dict[tuple[Task, int, Size], list[int]] = {}
    for i, (text, given) in enumerate(zip(texts, images, strict=True)):
        groups.setdefault((task_of(text, len(given)), len(given), sizes[i][0]), []).append(i)
    for (task, _, size), members in groups.items():
        canvas, own = on_canvas([[*map(fitted, images[i], sizes[i][1])] for i in members], size)
        unwanted = [negatives[i] for i in members] if negatives else ()
        asked = GenerationRequest(task, [texts[i] for i in members], canvas, size, sample_ids[members], unwanted, own)
        yield members, asked
