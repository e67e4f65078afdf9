"""Keeps frozen modules in host memory except while they are used (`memory.offload`)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Offloadable(nn.Module):
    """A frozen module; once `offloaded`, it stays in host memory, and its weights go to a device `at_work` only."""

    offloaded = False
    _works = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # `.to(device)` of the whole model passes it by.
        return self if self.offloaded else super()._apply(fn, recurse)

    @contextmanager
    def at_work(self, device: torch.device) -> Iterator[None]:
        """Have the weights on `device` within; they did not change, so nothing comes back."""
        if not self.offloaded or self._works:
            yield
            return
        named: list[dict[str, Any]] = [d for part in self.modules() for d in (part._parameters, part._buffers)]
        at_home = [dict(tensors) for tensors in named]
        moved: dict[int, Tensor] = {}
        self._works = True
        try:
            for tensors in named:
                for name, tensor in tensors.items():
                    # Weights that two layers share are moved once.
                    if tensor is not None and id(tensor) not in moved:
                        moved[id(tensor)] = _moved(tensor, device)
                    tensors[name] = tensor if tensor is None else moved[id(tensor)]
            yield
        finally:
            for tensors, before in zip(named, at_home, strict=True):
                tensors.update(before)
            self._works = False


@torch.no_grad()
def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and not tensor.is_pinned():
        # Pages that stay where they are come several times as fast.
        tensor.data = tensor.data.pin_memory()
    there = tensor.to(device, non_blocking=True)
    return nn.Parameter(there, requires_grad=False) if isinstance(tensor, nn.Parameter) else there
