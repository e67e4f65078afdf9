"""Linear layers whose weights are divided among the tensor ranks, and the collectives between them.

Two functions on activations are enough (Megatron-LM, arXiv 1909.08053, section 3): `copied` where what all ranks have
alike enters a region that is split, `summed` where it leaves. Megatron's own versions work in place and leave a
non-contiguous tensor unreduced without a word (`_reduce` of its mappings.py), so the first, which must take gradients
as autograd lays them out, is written here; its linear layers sum what they have just made and are right.
"""

import logging
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def _not_about_cuda_home(record: logging.LogRecord) -> bool:
    return "No CUDA runtime is found" not in record.getMessage()


# Without a GPU the import says that fused kernels and a CUDA runtime are missing; nothing here needs them.
_cpp_extension = logging.getLogger("torch.utils.cpp_extension")
_cpp_extension.addFilter(_not_about_cuda_home)
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
_cpp_extension.removeFilter(_not_about_cuda_home)


def _all_reduced(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    # A copy, because all_reduce works in place and x belongs to autograd; contiguous, because it must be.
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_reduced(gradient, ctx.group), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _all_reduced(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def copied(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return x, which is equal on all ranks; the backward pass sums the ranks' gradients."""
    return _Copied.apply(x, group)


def summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of the ranks' x; the backward pass gives every rank the whole gradient."""
    return _Summed.apply(x, group)


def _config(weight: Tensor, group: dist.ProcessGroup) -> ModelParallelConfig:
    # "cpu" initialization stands for any device, with no detour through a whole random matrix.
    return ModelParallelConfig(
        tensor_model_parallel_size=group.size(),
        params_dtype=weight.dtype,
        use_cpu_initialization=True,
        perform_initialization=False,
    )


class _Layer(nn.Module):
    """Lets megatron's layers replace layers of a diffusers module."""

    def _forward_impl(self, input: Tensor, weight: Tensor, **rest: Any) -> Tensor:
        # Megatron multiplies by matrices only; the weight of a 1x1 convolution stays what checkpoints know.
        return super()._forward_impl(input, weight.flatten(1), **rest)  # type: ignore[misc]  # megatron's

    # State dicts have the parameters and nothing else: no `_extra_state` of None.
    get_extra_state = nn.Module.get_extra_state


class Column(_Layer, ColumnParallelLinear):
    """x [..., in] -> this rank's channels of x W^T + b, [..., out]; no collective.

    weight: [out, in] of this rank, or [out, in, 1, 1] of a 1x1 convolution. bias: [out] of this rank. The gradient of x
    is this rank's share: x must have been `copied`, once for all layers that take it.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, group: dist.ProcessGroup):
        with torch.device("meta"):
            super().__init__(
                weight.shape[1],
                weight.shape[0] * group.size(),
                config=_config(weight, group),
                init_method=None,
                bias=bias is not None,
                # Added below: megatron gives the bias of a frozen weight no gradient.
                skip_bias_add=True,
                disable_grad_reduce=True,
                tp_group=group,
            )
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        out, bias = super().forward(x)
        return out if bias is None else out + bias


class Row(_Layer, RowParallelLinear):
    """This rank's channels of x, [..., in] -> x W^T + b of all ranks together, [..., out]; one all-reduce forward.

    weight: [out, in] of this rank, or [out, in, 1, 1] of a 1x1 convolution. bias: [out], equal on all ranks.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, group: dist.ProcessGroup):
        with torch.device("meta"):
            super().__init__(
                weight.shape[1] * group.size(),
                weight.shape[0],
                config=_config(weight, group),
                init_method=None,
                bias=bias is not None,
                input_is_parallel=True,
                skip_bias_add=True,
                tp_group=group,
            )
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        # Contiguous in, contiguous out: megatron's all-reduce needs it.
        out, bias = super().forward(x.contiguous())
        return out if bias is None else out + bias


class _Pointwise(nn.Module):
    """A 1x1 convolution as a linear layer on tokens: x [B, in, h, w] -> [B, out, h, w]."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x.flatten(2).transpose(1, 2))
        return out.transpose(1, 2).unflatten(2, x.shape[2:])


class PointwiseColumn(_Pointwise, Column):
    """A 1x1 convolution as `Column`."""


class PointwiseRow(_Pointwise, Row):
    """A 1x1 convolution as `Row`."""


class AcrossHeadsRMSNorm(nn.Module):
    """diffusers' RMSNorm over the channels of all heads, where each rank has some of them.

    x: [..., channels of this rank] -> the same shape, in the type of the weight, [channels of this rank]. width:
    channels of all ranks, without those of heads that only pad. The mean square enters every rank's output, so it is
    summed forward and its gradient is summed backward.
    """

    def __init__(self, weight: nn.Parameter, width: int, eps: float, group: dist.ProcessGroup):
        super().__init__()
        self.weight, self.width, self.eps, self.group = weight, width, eps, group

    def forward(self, x: Tensor) -> Tensor:
        square = x.float().pow(2).sum(-1, keepdim=True)
        mean = copied(summed(square, self.group), self.group) / self.width
        return (x * torch.rsqrt(mean + self.eps)).to(self.weight.dtype) * self.weight
