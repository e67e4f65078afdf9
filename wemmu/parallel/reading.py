"""Numbers that a GPU computes and the host reads later, so that it need not wait inside a step."""

from typing import SupportsFloat

import torch
from torch import Tensor


class Reading:
    """A scalar that is being copied to the host. `float(reading)` waits for this number, not for later work."""

    def __init__(self, value: Tensor):
        """value: a scalar on a GPU, already computed or queued."""
        self._host = torch.empty((), dtype=value.dtype, pin_memory=True)
        self._host.copy_(value.detach(), non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record(torch.cuda.current_stream(value.device))

    def __float__(self) -> float:
        self._arrived.synchronize()
        return float(self._host)


def on_its_way(value: Tensor) -> SupportsFloat:
    """Return the number, or where a GPU still computes it a `Reading`."""
    return Reading(value) if value.device.type == "cuda" else float(value)
