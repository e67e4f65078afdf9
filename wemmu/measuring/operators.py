"""Operators on tensors without values, several times faster than torch's `FakeTensorMode` alone.

A model repeats the same layer, so its operators meet the same sizes again and again. The sizes, strides and types that
an operator returns follow from those of its arguments, so torch is asked once for each.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

aten = torch.ops.aten
# The result depends on numbers, or the argument itself gets other sizes.
_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}
# The indices are real integers or fake ones; masks have been replaced (`fake_world`).
_SIZED = {aten.index.Tensor}
# The schema promises a new tensor, but these are views.
_VIEWS = {aten._unsafe_view.default, aten._reshape_alias.default}


@dataclass(frozen=True)
class _Layout:
    """A new tensor that fills its storage."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="meta")


class _NotComparedError(Exception):
    """An argument or result that sizes and dtype do not describe completely."""


class Operators:
    """Runs operators as `mode` does where no argument is a floating-point tensor with numbers."""

    # All worlds of a process share what is known.
    _kinds: ClassVar[dict[Any, str]] = {}
    # (Operator, arguments) -> what it returns; None: torch is asked each time.
    _known: ClassVar[dict[Any, tuple[_Layout | None, ...] | _Layout | None]] = {}

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
        if (kind := self._kinds.get(func)) is None:
            kind = self._kinds[func] = _kind(func)
        if kind == "view" and type(args[0]) is FakeTensor:
            return self._view(func, args, kwargs)
        if kind == "other":
            return self._ask(func, args, kwargs)
        try:
            key = (func, torch.get_default_dtype(), _compared(args), _compared(tuple(kwargs.items())))
        except _NotComparedError:
            return self._ask(func, args, kwargs)
        if key not in self._known:
            out = self._ask(func, args, kwargs)
            self._known[key] = _layouts(out)
            return out
        known = self._known[key]
        if known is None:
            return self._ask(func, args, kwargs)
        if kind == "in place":
            return args[0]
        return self._new(known) if isinstance(known, _Layout) else tuple(map(self._new, known))

    def _ask(self, func: Any, args: Any, kwargs: Any) -> Any:
        # As entering `mode`, which would look for a GPU every time.
        torch._C._set_dispatch_mode(self.mode)
        try:
            return func(*args, **kwargs)
        finally:
            torch._C._unset_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)

    def _new(self, layout: _Layout | None) -> FakeTensor | None:
        return None if layout is None else FakeTensor(self.mode, layout.empty(), layout.device)

    def _view(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the kernel of real tensors: `mode` gives dimensions of size 1 other strides, and so copies more often."""
        with in_kernel_invocation_manager(self.mode):
            out = func(*args, **kwargs)
        device = args[0].fake_device
        if isinstance(out, Tensor):
            return out if out is args[0] else FakeTensor(self.mode, out, device)
        return type(out)(FakeTensor(self.mode, one, device) for one in out)


def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among an operator's arguments or results, also those in lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors(value)


def _kind(func: Any) -> str:
    """What the schema says that `func` returns: a "view", a "new" tensor, its first argument "in place", or "other"."""
    if func.namespace != "aten" or (func not in _SIZED and _TAGS & set(func.tags)):
        return "other"
    if func.is_view or func in _VIEWS:
        return "view"
    schema = func._schema
    if "lift" in schema.name or any(str(one.type) != "Tensor" for one in schema.returns):
        return "other"
    aliased = [one.alias_info is not None for one in schema.arguments]
    if not any(aliased):
        return "new"
    return "in place" if aliased[0] and not any(aliased[1:]) and len(schema.returns) == 1 else "other"


def _compared(arg: Any) -> Any:
    """All of an argument that decides what tensors an operator returns."""
    kind = type(arg)
    if kind is FakeTensor:
        if arg.constant is not None:
            raise _NotComparedError
        return arg.shape, arg.stride(), arg.dtype, arg.fake_device
    if issubclass(kind, Tensor):
        # A number of Python's becomes a tensor without dimensions, which decides no type.
        if kind is not Tensor or arg.dim() == 0:
            raise _NotComparedError
        return arg.shape, arg.stride(), arg.dtype, arg.device
    if kind is tuple or kind is list:
        return kind, tuple(map(_compared, arg))
    return kind, arg


def _layouts(out: Any) -> Any:
    if isinstance(out, tuple):
        found = [one if one is None else _layouts(one) for one in out]
        return None if any(a is None and b is not None for a, b in zip(found, out, strict=True)) else tuple(found)
    if type(out) is not FakeTensor or out.constant is not None or out.storage_offset():
        return None
    layout = _Layout(out.shape, out.stride(), out.dtype, out.fake_device)
    same = layout.empty().untyped_storage().nbytes() == out.untyped_storage().nbytes()
    return layout if same else None
