"""A counter of FLOPs, for models with numbers."""

from typing import Any

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
