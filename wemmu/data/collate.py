"""Samples of one stream -> a batch."""

import hashlib
from collections.abc import Sequence

import torch

from wemmu.config.shards import TURN, StreamSettings
from wemmu.config.task import UNDERSTANDING_TASKS, Task
from wemmu.data.shards import DecodedRecord, stacked
from wemmu.pixels import on_canvas
from wemmu.positions import token_grid
from wemmu.prompts import PromptEncoder
from wemmu.types import Batch, Latents


def collate(
    settings: StreamSettings,
    samples: Sequence[DecodedRecord],
    encoder: PromptEncoder,
    token_px: int,
    asks: str = "",
) -> Batch:
    """Build a micro-batch. token_px: side of a VLM token in pixels, which sets the number of placeholders.

    asks: what records of the task caption ask; with their captions as answers if all of the batch have one.
    """
    latents, sizes = None, None
    if settings.latents is not None:
        stored = torch.stack([s.stored for s in samples])  # [B, 1 + N, C, h, w]
        latents = Latents(target=stored[:, 0], images=None if settings.mixed else stored[:, 1:])
    ids, texts = torch.tensor([sample_id(s.id) for s in samples]), [s.prompt for s in samples]
    if settings.mixed:
        images, sizes = on_canvas([tuple(s.images) for s in samples], (settings.height, settings.width))
    else:
        images = stacked([s.images for s in samples if isinstance(s.images, torch.Tensor)])
    grids = [[token_grid(image.shape[-2], image.shape[-1], token_px) for image in s.images] for s in samples]
    if settings.task is Task.CAPTION:
        texts = [asks] * len(samples)
        if not all(s.answer for s in samples):
            rows = [encoder.token_ids(text, sizes) for text, sizes in zip(texts, grids, strict=True)]
            return Batch(settings.task, ids, encoder.pad(rows, grids), images, target=None)
    if settings.task in (*UNDERSTANDING_TASKS, Task.CAPTION):
        said = [s.answer.split(TURN) for s in samples]
        turns = [list(zip(text.split(TURN), answers, strict=True)) for text, answers in zip(texts, said, strict=True)]
        prompts, labels = encoder.conversations(turns, grids)
        return Batch(settings.task, ids, prompts, images, target=None, labels=labels)
    target = stacked([s.target for s in samples])
    return Batch(settings.task, ids, encoder(texts, grids), images, target, latents, sizes=sizes)


def sample_id(record: str) -> int:
    """Hash a record's id to [0, 2^63): the key of all randomness of this sample."""
    return int.from_bytes(hashlib.blake2b(record.encode(), digest_size=8).digest()) >> 1
