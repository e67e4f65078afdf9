"""Randomness keyed by what it is for, never by who draws it.

Every draw is a function of (seed, step, sample id, purpose). So a run that is resumed, moved to another number of
ranks or split into other micro-batches sees the same noise for the same sample at the same step.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Noise:
    """The random numbers of one batch at one step.

    sample_ids: int64 [B] on the CPU. Draws are made on the CPU, sample by sample, and moved to `device`, so that
    they do not depend on the kind of device either.
    """

    seed: int
    step: int
    sample_ids: Tensor
    device: torch.device | str = "cpu"

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal [B, *shape]."""
        return self._draw(purpose, lambda g: torch.randn(shape, generator=g))

    def uniform(self, purpose: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Uniform in [0, 1), [B, *shape]."""
        return self._draw(purpose, lambda g: torch.rand(shape, generator=g))

    def _draw(self, purpose: str, draw) -> Tensor:
        generator = torch.Generator()
        rows = []
        for sample_id in self.sample_ids.tolist():
            key = f"{self.seed}/{self.step}/{sample_id}/{purpose}".encode()
            generator.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest()))
            rows.append(draw(generator))
        return torch.stack(rows).to(self.device)
