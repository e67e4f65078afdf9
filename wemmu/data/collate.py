"""Samples of one stream -> a batch."""

import hashlib
from collections.abc import Sequence

import torch

from wemmu.config.shards import StreamSettings
from wemmu.data.shards import Sample, stacked
from wemmu.positions import token_grid
from wemmu.prompts import PromptEncoder
from wemmu.types import Batch, Latents


def collate(settings: StreamSettings, samples: Sequence[Sample], encoder: PromptEncoder, token_px: int) -> Batch:
    """The samples as a micro-batch. token_px: pixels of one VLM token's side, which sets the placeholders."""
    grid = token_grid(settings.height, settings.width, token_px)
    latents = None
    if settings.latents is not None:
        stored = torch.stack([s.latents for s in samples])  # [B, 1 + N, C, h, w]
        latents = Latents(target=stored[:, 0], images=stored[:, 1:])
    return Batch(
        task=settings.task,
        sample_ids=torch.tensor([sample_id(s.id) for s in samples]),
        prompts=encoder([s.prompt for s in samples], [[grid] * len(s.images) for s in samples]),
        images=stacked([s.images for s in samples]),
        target=stacked([s.target for s in samples]),
        latents=latents,
    )


def sample_id(record: str) -> int:
    """The number, in [0, 2^63), that stands for the record with this id wherever randomness is keyed by the sample."""
    return int.from_bytes(hashlib.blake2b(record.encode(), digest_size=8).digest()) >> 1
