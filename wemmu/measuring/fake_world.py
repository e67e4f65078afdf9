"""Training steps without values: floating-point tensors have only shapes; integers are computed.

So a model of any size runs through its own code, in order, on a machine that could not hold one of its layers, and
whatever it allocates and sends can be counted. Integers (ids, positions, masks, sizes of windows) decide what is done,
so they are real. A floating-point number that the code asks for, such as the norm of the gradient, is 1, and so is an
integer that comes from another rank.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools import fake_collectives  # noqa: F401 (collectives on tensors without numbers)
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from wemmu.measuring.operators import Operators, tensors

aten, c10d, device = torch.ops.aten, torch.ops.c10d, torch.ops.prim.device.default
# Attention on a CPU, which torch's counter of FLOPs does not know -> place of the queries among its arguments.
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: 0,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: 1,
}
# Collective -> (its name, place of the process group and of the tensor or list that is whole among its arguments).
COLLECTIVES = {
    c10d._allgather_base_.default: ("all_gather", 2, 0),
    c10d.allgather_.default: ("all_gather", 2, 0),
    c10d.allgather_into_tensor_coalesced_.default: ("all_gather", 2, 0),
    c10d._reduce_scatter_base_.default: ("reduce_scatter", 2, 1),
    c10d.reduce_scatter_tensor_coalesced_.default: ("reduce_scatter", 2, 1),
    c10d.reduce_scatter_.default: ("reduce_scatter", 2, 1),
    c10d.allreduce_.default: ("all_reduce", 1, 0),
    c10d.broadcast_.default: ("broadcast", 1, 0),
    c10d.scatter_.default: ("scatter", 2, 0),
    c10d.send.default: ("send", 1, 0),
    c10d.recv_.default: ("receive", 1, 0),
}
# What takes a list of indices; how many places a mask chooses is known, because it is real.
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
UNCOUNTED = {c10d.barrier.default}


class _Shapes(FakeTensorMode):
    """The one mode of all tensors, also of those that a module's deep copy consists of."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shapes":
        return self


@dataclass(frozen=True)
class Collective:
    """kind: all_gather, reduce_scatter, all_reduce, broadcast, scatter, send or receive. size: ranks of its group."""

    kind: str
    size: int


@dataclass
class Traffic:
    """Collective -> number of calls and bytes of the whole tensors that it gathers, reduces or sends."""

    calls: Counter[Collective] = field(default_factory=Counter)
    bytes: Counter[Collective] = field(default_factory=Counter)


class FakeWorld(TorchDispatchMode):
    """A context without floating-point computation; see the module.

    traffic: of all collectives since it was last replaced; flops: of all products since the process began. alive: bytes
    of all storages there are, peak: the most since `forget_peak`. at_peak: called whenever `alive` has grown by a
    hundredth above what it was at the call before. purpose: what is allocated now will be for, if that is known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = _Shapes(allow_non_fake_inputs=True)
        self._operators = Operators(self.fake)
        self.traffic = Traffic()
        self.alive = self.peak = self.flops = 0
        self.at_peak: Callable[[], None] | None = None
        self.purpose: str | None = None
        self._called_at = 0.0
        # Storage's address -> (a reference that tells of its end, bytes, its purpose).
        self._storages: dict[int, tuple[weakref.ref[torch.UntypedStorage], int, str | None]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would wrap each call once more to keep its compiler out, which does not run here.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is device and type(args[0]) is FakeTensor:
            # Asked for twice by most operators.
            return torch.device("meta") if self.fake.in_kernel_invocation else args[0].fake_device
        if any(issubclass(t, DTensor) for t in types):
            # Comes back with the tensors that it consists of.
            return NotImplemented
        kwargs = kwargs or {}
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            # DTensor asks on shapes of its own how an operator would be sharded.
            return func(*args, **kwargs)
        self._count(func, args)
        out = self._run(func, args, kwargs)
        self.flops += flops(func, args, out)
        for tensor in tensors((out,)):
            if tensor.device.type != "meta":
                self._keep(tensor.untyped_storage())
        if self.at_peak is not None and self.alive > 1.01 * self._called_at:
            self._called_at = self.alive
            self.at_peak()
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        inputs = [*tensors(args), *tensors(kwargs.values())]
        fakes = [x for x in inputs if isinstance(x, FakeTensor)]
        if fakes and func is aten._local_scalar_dense.default:
            return {torch.bool: False}.get(fakes[0].dtype, 1)
        if func is c10d.recv_.default and not fakes:
            for tensor in inputs:
                # What the stages of a pipeline ask each other before their first step: are the shapes known? They are.
                tensor.fill_(1)
        if fakes and func._overloadpacket in INDEXED:
            args = (args[0], _places(args[1]), *args[2:])
        if fakes or not inputs:
            out = self._operators(func, args, kwargs)
            if fakes or all(x.is_floating_point() for x in tensors((out,))):
                return out
        return tree_map_only(Tensor, self._without_numbers, func(*args, **kwargs))

    def _without_numbers(self, tensor: Tensor) -> Tensor:
        return self.fake.from_tensor(tensor) if tensor.is_floating_point() else tensor

    def _count(self, func: Any, args: Any) -> None:
        if func not in COLLECTIVES:
            assert func.namespace not in ("c10d", "_c10d_functional") or func in UNCOUNTED, func
            return
        kind, group, whole = COLLECTIVES[func]
        collective = Collective(kind, torch.distributed.ProcessGroup.unbox(args[group]).size())
        if collective.size == 1:
            return
        self.traffic.calls[collective] += 1
        tensors = [x for x in tree_leaves(args[whole]) if isinstance(x, Tensor)]
        size = sum(x.nbytes for x in tensors)
        # The source alone has the list of what it scatters.
        self.traffic.bytes[collective] += size * (collective.size if kind == "scatter" else 1)

    def _keep(self, storage: torch.UntypedStorage) -> None:
        if (key := storage._cdata) not in self._storages:
            size = storage.nbytes()
            self._storages[key] = weakref.ref(storage, lambda _: self._end(key)), size, self.purpose
            self._grow(size)

    def _end(self, key: int) -> None:
        self.alive -= self._storages.pop(key)[1]

    def _grow(self, size: int) -> None:
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Record storages that sharded engines free and fill without an operator."""
        if (key := storage._cdata) in self._storages:
            reference, before, purpose = self._storages[key]
            self._storages[key] = reference, storage.nbytes(), purpose
            self._grow(storage.nbytes() - before)

    def storages(self) -> dict[int, tuple[int, str | None]]:
        """Return address -> (bytes, purpose if known) of every storage."""
        return {key: (size, purpose) for key, (_, size, purpose) in self._storages.items()}

    def claim(self, storage: torch.UntypedStorage, purpose: str) -> None:
        """Say what a storage that is there is for."""
        if (key := storage._cdata) in self._storages:
            self._storages[key] = *self._storages[key][:2], purpose

    def forget_peak(self) -> None:
        self.peak, self._called_at = self.alive, 0.0


def _places(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Masks as the numbers of the places that they choose."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found


def flops(func: Any, args: Any, out: Any) -> int:
    """Return the FLOPs of a matrix product or a convolution, two for each multiply-add; 0 for anything else."""
    if func is aten.convolution_backward.default:
        # torch's own formula takes a depthwise convolution's weight gradient for that of a full one.
        gradient, _, weight = args[:3]
        return 2 * gradient.numel() * math.prod(weight.shape[1:]) * (args[-1][0] + args[-1][1])
    if func in ATTENTION:
        first = ATTENTION[func]
        q, k = args[first], args[first + 1]
        # Two products forward, five backward; one of these repeats a forward product.
        return (4 if first == 0 else 8) * q.numel() * k.shape[-2]
    if func._overloadpacket in flop_registry:
        return flop_registry[func._overloadpacket](*args, out_val=out)
    return 0


@contextmanager
def fake_world(mode: FakeWorld | None = None) -> Iterator[FakeWorld]:
    """Run all torch operations of this thread without values until the end of the block."""
    resize, mode = torch.UntypedStorage.resize_, mode or FakeWorld()

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        out = resize(storage, size)
        mode.resized(storage)
        return out

    def replace(tensor: Tensor, by: Tensor) -> None:
        # A module that is moved or cast swaps tensors of subclasses, which those with weak references refuse.
        tensor.data = by.data

    patches = (
        (torch.UntypedStorage, "resize_", torch.UntypedStorage.resize_, resize_),
        (torch.utils, "swap_tensors", torch.utils.swap_tensors, replace),
    )
    for owner, name, _, ours in patches:
        setattr(owner, name, ours)
    try:
        with mode:
            yield mode
    finally:
        for owner, name, theirs, _ in patches:
            setattr(owner, name, theirs)
