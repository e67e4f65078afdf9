"""Keeps buffers in float32 when their model is cast."""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn


class KeepsFloat32:
    """A module whose float32 buffers move between devices and are never cast."""

    _buffers: dict[str, Tensor | None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {name: buffer for name, buffer in self._buffers.items() if _is_float32(buffer)}
        super()._apply(fn, recurse)  # type: ignore[misc]
        for name, buffer in kept.items():
            now = self._buffers[name]
            if now is not None and now.dtype != torch.float32:
                self._buffers[name] = buffer.to(now.device)
        return self


def keep_float32_buffers(model: nn.Module) -> None:
    """Let `.to(dtype)`, `.half()` and the like leave alone the buffers of `model` and its parts that are float32 now.

    torch casts buffers with the weights, and rotary frequencies in bfloat16 turn the token at position 400 by 0.46 rad
    too much or too little. A pipeline casts its components one by one, so it is each module with such a buffer that
    must know better: it becomes of a class of the same name that does.
    """
    for module in model.modules():
        if not isinstance(module, KeepsFloat32) and any(map(_is_float32, module._buffers.values())):
            cls: Any = type(module)
            module.__class__ = _keeping(cls)


@cache
def _keeping(cls: type) -> type:
    return type(cls.__name__, (KeepsFloat32, cls), {"__module__": cls.__module__})


def _is_float32(buffer: Tensor | None) -> TypeGuard[Tensor]:
    return buffer is not None and buffer.dtype == torch.float32
