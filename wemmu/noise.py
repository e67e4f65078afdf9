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

from wemmu import philox
from wemmu.config.schema import NoiseSource

# Numbers for a sample; fewer are drawn sooner than a thread is started.
WORTH_A_THREAD = 50_000


def on_device(source: NoiseSource, device: torch.device | str) -> bool:
    """Return whether `source` draws on `device` itself; see `wemmu.config.schema.Kernels.noise`."""
    return source == "device" or (source == "auto" and torch.device(device).type != "cpu")


@dataclass(frozen=True)
class Noise:
    """The random numbers of one batch at one step.

    sample_ids: int64 [B]. source: `host` draws on the CPU with torch's generator, sample by sample, and moves the
    numbers to `device`; they do not depend on the kind of device. `device` draws there by Philox: the words are the
    same on every device, normal numbers may differ in the last bits. `auto`: `host` on a CPU, else `device`.
    """

    seed: int
    step: int
    sample_ids: Tensor
    device: torch.device | str = "cpu"
    source: NoiseSource = "host"

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Draw standard normal numbers [B, *shape]."""
        return self._draw(purpose, shape, torch.randn, philox.normal)

    def uniform(self, purpose: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Draw numbers uniform in [0, 1), [B, *shape]."""
        return self._draw(purpose, shape, torch.rand, philox.uniform)

    def _draw(
        self, purpose: str, shape: tuple[int, ...], draw: Callable[..., Tensor], keyed: Callable[..., Tensor]
    ) -> Tensor:
        if not on_device(self.source, self.device):
            return self._on_host(purpose, shape, draw)
        digest = hashlib.blake2b(f"{self.seed}/{self.step}/{purpose}".encode(), digest_size=8).digest()
        # Filled, not copied: the host does not wait.
        key = tuple(
            torch.full((), int.from_bytes(digest[at : at + 4]), dtype=torch.int64, device=self.device) for at in (0, 4)
        )
        return keyed(key, self.sample_ids.to(self.device), math.prod(shape)).reshape(-1, *shape)

    def _on_host(self, purpose: str, shape: tuple[int, ...], draw: Callable[..., Tensor]) -> Tensor:
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
