"""Counters of FLOPs and of memory, for models with numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from wemmu.measuring.fake_world import flops


class FlopCounter(TorchDispatchMode):
    """Counts products of tensors that have numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.flops += flops(func, args, out)
        return out


@contextmanager
def kept_by_autograd(model: nn.Module) -> Iterator[dict[int, int]]:
    """Yield what is kept from forward to backward, the model's weights apart: address of a storage -> its bytes."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept
