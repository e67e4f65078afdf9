"""Frozen linear layers in 8 or 4 bit, by the kernels of bitsandbytes, which run on GPUs and CPUs.

A weight is unpacked for each product, and multiplied in the type of the input.
"""

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wemmu.config.schema import Quantization
from wemmu.published.layout import BackboneError

# Numbers of a weight that share a scale: QLoRA's for nf4 (arXiv 2305.14314), arXiv 2110.02861's order for int8.
BLOCK = {"nf4": 64, "int8": 256}


class _Product(torch.autograd.Function):
    """x W^T that saves W packed for the backward pass; plain autograd would save it unpacked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: list[int], packed: Tensor, scales: Tensor, code: Tensor | None) -> Tensor:
        ctx.save_for_backward(packed, scales, code)
        ctx.shape = shape
        return F.linear(x, _unpacked(shape, packed, scales, code, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        packed, scales, code = ctx.saved_tensors
        return gradient @ _unpacked(ctx.shape, packed, scales, code, gradient.dtype), None, None, None, None


def _unpacked(shape: list[int], packed: Tensor, scales: Tensor, code: Tensor | None, dtype: torch.dtype) -> Tensor:
    ops = torch.ops.bitsandbytes
    if code is None:
        return ops.dequantize_4bit(packed, scales, BLOCK["nf4"], "nf4", shape, dtype)
    return ops.dequantize_blockwise(packed, scales, code, BLOCK["int8"], dtype)


class QuantizedLinear(nn.Module):
    """A frozen `nn.Linear` whose weight is packed in buffers and is not a parameter; the bias is unchanged."""

    packed: Tensor
    scales: Tensor
    code: Tensor | None

    def __init__(self, layer: nn.Linear, kind: Quantization):
        super().__init__()
        ops, code, weight = torch.ops.bitsandbytes, None, layer.weight.detach()
        self.shape, self.bias = list(weight.shape), layer.bias
        if kind == "nf4":
            packed, scales = ops.quantize_4bit(weight, BLOCK[kind], kind, torch.uint8)
        else:
            code = import_module("bitsandbytes.functional").create_linear_map(signed=True).to(weight.device)
            packed, scales = ops.quantize_blockwise(weight, code, BLOCK[kind])
        for name, tensor in (("packed", packed), ("scales", scales), ("code", code)):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self.shape, self.packed, self.scales, self.code)
        return y if self.bias is None else y + self.bias


def quantizable(root: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of the repeated blocks within `root` by name, without adapters (LoRA) among them."""
    # A root that is itself a list of blocks has an empty name.
    blocks = tuple(f"{name}."[not name :] for name, part in root.named_modules() if isinstance(part, nn.ModuleList))
    return {
        name: part for name, part in root.named_modules()
        if isinstance(part, nn.Linear) and name.startswith(blocks) and ".lora_" not in name
    }  # fmt: skip


def pack(root: nn.Module, kind: Quantization) -> None:
    """Replace the layers that are `quantizable`.

    Raises:
        BackboneError: if bitsandbytes is not installed.
    """
    try:
        import_module("bitsandbytes")
    except ImportError as error:
        raise BackboneError(
            f"memory.quantize needs bitsandbytes, which cannot be imported ({error}); install the extra "
            "`pip install 'wemmu[quantize]'`, or remove memory.quantize"
        ) from error
    for name, layer in quantizable(root).items():
        parent, _, last = name.rpartition(".")
        setattr(root.get_submodule(parent), last, QuantizedLinear(layer, kind))
