"""FSDP2: float32 weights, gradients and moments sharded over the ranks of a group; a module gathers its own."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from wemmu.checkpoint.sharded_tensor import TensorShard, TensorSlice, row_parts
from wemmu.parallel.host_memory import trim


def shard(root: nn.Module, units: Iterable[nn.Module], group: ProcessGroup, device: torch.device) -> None:
    """Shard `root` over the ranks of `group`; each of `units`, modules in it, is gathered by itself.

    The shards are float32; a module computes in the type that its weights have now. Gradients are summed over the
    ranks, in float32, and not averaged: each rank's loss is its share of the global mean. Weights on the meta device
    become shards of zeros, unit by unit, and are never whole in memory.
    """
    dtype = next(root.parameters()).dtype
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    root.float()
    mesh = DeviceMesh.from_group(group, device.type)
    for module in (*units, root):
        empty = _give_memory(module)
        fully_shard(module, mesh=mesh, mp_policy=policy)
        for parent, name in empty:
            local(parent.get_parameter(name)).detach().zero_()
        trim()
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo knows neither an average nor a weighted sum.
            module.set_force_sum_reduction_for_comms(True)


def _give_memory(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Give weights on the meta device memory on the CPU that nobody has touched, which takes none; returns where."""
    empty = [
        (parent, name)
        for parent in module.modules()
        for name, parameter in parent.named_parameters(recurse=False)
        if parameter.is_meta
    ]
    for parent, name in empty:
        parameter = parent.get_parameter(name)
        memory = torch.empty(parameter.shape, dtype=parameter.dtype)
        parent.register_parameter(name, nn.Parameter(memory, requires_grad=parameter.requires_grad))
    return empty


def local(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a sharded parameter or gradient; live memory."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


def parts(parameter: DTensor, rows: Tensor, where: TensorSlice) -> Sequence[TensorShard]:
    """Return where `rows`, this rank's rows of `parameter` or of one of its moments, are in the whole tensor.

    where: the place of `parameter` in the whole one; it may be a tensor-parallel slice.
    """
    mesh = parameter.device_mesh
    # torch.chunk's way: all ranks but the last hold the same number of rows.
    first = -(-parameter.shape[0] // mesh.size()) * mesh.get_local_rank()
    return row_parts(where.shape, rows, min(first, parameter.shape[0]), where.dim, where.ranges)
