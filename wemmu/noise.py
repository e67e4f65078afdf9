"""Randomness keyed by what it is for, never by who draws it.

Every draw is a function of (seed, step, sample id, purpose). So a run that is resumed, moved to another number of
ranks or split into other micro-batches sees the same noise for the same sample at the same step.
"""

import hashlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

# Numbers for a sample; fewer are drawn sooner than a thread is started.
WORTH_A_THREAD = 50_000


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
        return self._draw(purpose, shape, torch.randn)

    def uniform(self, purpose: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Uniform in [0, 1), [B, *shape]."""
        return self._draw(purpose, shape, torch.rand)

    def _draw(self, purpose: str, shape: tuple[int, ...], draw: Callable[..., Tensor]) -> Tensor:
        def row(sample_id: int) -> Tensor:
            key = f"{self.seed}/{self.step}/{sample_id}/{purpose}".encode()
            seed = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest())
            return draw(shape, generator=torch.Generator().manual_seed(seed))

        ids = self.sample_ids.tolist()
        # The queries of one image of 1024 px are 2.7 M numbers, some 15 ms, for which a GPU would wait. torch draws
        # on one thread, whatever it may use, and lets go of the interpreter meanwhile.
        threads = min(torch.get_num_threads(), len(ids))
        if threads == 1 or math.prod(shape) < WORTH_A_THREAD:
            return torch.stack([row(i) for i in ids]).to(self.device)
        with ThreadPoolExecutor(threads) as pool:
            return torch.stack(list(pool.map(row, ids))).to(self.device)
