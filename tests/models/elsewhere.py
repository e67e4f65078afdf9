"""A second device on any machine: torch's fake tensors refuse what mixes devices, and their twins compute.

Fake tensors of device "meta" stand for those of a GPU. (Those of device "cuda" need no GPU either, but a CUDA build of
torch refuses their backward pass without a driver.) A fake tensor has no numbers, and models ask for numbers: how many
image tokens a prompt holds, which windows an image has. So each fake tensor has a twin, a real tensor on the CPU, that
goes through the same operators and answers.
"""

from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ELSEWHERE = torch.device("meta")


class Elsewhere(TorchDispatchMode):
    """Within it tensors that are moved to `ELSEWHERE` are on another device than the others.

    Raises RuntimeError, as CUDA would, at the first operator that is given tensors of both.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fake, self._more = FakeTensorMode(allow_non_fake_inputs=True), ExitStack()

    def __enter__(self) -> "Elsewhere":
        self._more.enter_context(_Numbers())
        self._more.enter_context(mock.patch.object(torch, "autocast", _Autocast))
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._more.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch._C._current_graph_task_id() != -1:
            # The backward passes of indexing and of casts name the device that C++ believes in.
            kwargs.pop("device", None)
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return func(*args, **kwargs)
        _check_lists(func, args)
        real_args, real_kwargs = tree_map_only(Tensor, twin, (args, kwargs))
        if "device" in real_kwargs:
            real_kwargs = real_kwargs | {"device": torch.device("cpu")}
        # Sizes and devices first: an operator that works in place must not have done so when it is refused.
        args, kwargs = tree_map_only(Tensor, self._faked, (args, kwargs))
        try:
            with self._fake:
                fake = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            fake = None
        real = func(*real_args, **real_kwargs)
        if not isinstance(real, Tensor) and not any(isinstance(x, Tensor) for x in tree_leaves(real)):
            return real
        if fake is None:
            device = next(x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
            with self._fake:
                fake = tree_map_only(Tensor, lambda x: torch.empty_like(x, device=device), real)
        for one, other in zip(tree_leaves(fake), tree_leaves(real), strict=True):
            if isinstance(one, Tensor):
                one.twin = other
        return fake

    def _faked(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        fake = self._fake.from_tensor(tensor)
        fake.twin = tensor
        return fake


class _Numbers(TorchFunctionMode):
    """What never reaches an operator: numbers that stand in the code, and where a tensor's memory is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.data_ptr:
            return func(twin(args[0]))
        # Made on the CPU and moved, for on "meta" it would have no numbers.
        device = (kwargs or {}).pop("device", None) if func is torch.tensor else None
        made = func(*args, **(kwargs or {}))
        return made if device is None else made.to(device)


class _Autocast(torch.autocast):
    """Knows no "meta"; models name the device only to switch it off there."""

    def __init__(self, device_type: str, *arguments: Any, **options: Any):
        super().__init__("cpu" if device_type == ELSEWHERE.type else device_type, *arguments, **options)


def twin(tensor: Tensor) -> Tensor:
    """The numbers of a tensor."""
    return tensor.twin if isinstance(tensor, FakeTensor) else tensor


def _check_lists(func: Any, args: Any) -> None:
    """Fused operators take lists of tensors, and their fake kernels do not look where these are."""
    if func.namespace == "aten" and func._opname.startswith(("_fused_", "_foreach_")):
        devices = {x.device for x in tree_leaves([a for a in args if isinstance(a, list | tuple)])}
        if len(devices) > 1:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found {devices}")
