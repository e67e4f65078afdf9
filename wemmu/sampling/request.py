"""Requests to a model and its responses."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from wemmu.config.task import Task


@dataclass(frozen=True)
class GenerationRequest:
    """A batch of one task and one shape.

    texts: B prompts or questions. images: uint8 [B, N, 3, H, W], N = 0 without input. size: (height, width) px of the
    images to make, multiples of the autoencoder's and not smaller than a VLM token. sample_ids: int64 [B], key of the
    noise. negatives: B texts that the guidance leads away from; none stands for empty ones, as in training.
    """

    task: Task
    texts: Sequence[str]
    images: Tensor
    size: tuple[int, int]
    sample_ids: Tensor
    negatives: Sequence[str] = ()


@dataclass(frozen=True)
class Response:
    """The answer to one sample of a request: an image and words.

    restored: whether the image is the input made again. A VLM that only answers returns the input itself.
    """

    image: Image.Image
    words: str = ""
    restored: bool = False


def task_of(text: str, images: int) -> Task:
    """The task a free request stands for, by what it brings."""
    if images == 0:
        return Task.T2I if text else Task.UNCONDITIONAL
    if images == 1:
        return Task.EDIT if text else Task.RECONSTRUCTION
    return Task.MULTI_EDIT
