"""Small DiTs, what they compute, and how what the tensor ranks of a split one have becomes whole again."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from diffusers import SanaTransformer2DModel
from torch import Tensor

from wemmu.checkpoint.sharded_tensor import TensorSlice


def small(heads: int, cross_heads: int, **changes: Any) -> dict[str, Any]:
    """A config of two blocks."""
    sizes = {"attention_head_dim": 16, "cross_attention_head_dim": 12, "cross_attention_dim": 16 * heads}
    ends = {"in_channels": 4, "out_channels": 4, "caption_channels": 24, "sample_size": 4, "interpolation_scale": 1.0}
    number = {"num_attention_heads": heads, "num_cross_attention_heads": cross_heads, "num_layers": 2, "mlp_ratio": 2.5}
    return {**sizes, **ends, **number, **changes}


def make(config: Mapping[str, Any]) -> SanaTransformer2DModel:
    """The same on every rank; no weight is 0 or 1, as some are that diffusers makes."""
    torch.manual_seed(5)
    dit = SanaTransformer2DModel(**config)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return dit


def run(dit: SanaTransformer2DModel, seed: int = 0, backward: bool = True) -> dict[str, Tensor]:
    """`output`, and the gradients of the inputs and of every trained parameter of a weighted sum of it."""
    draw, config = torch.Generator().manual_seed(seed), dit.config
    noisy = torch.randn(2, config.in_channels, 3, 5, generator=draw).to(dit.dtype).requires_grad_()
    condition = torch.randn(2, 6, config.caption_channels, generator=draw).to(dit.dtype).requires_grad_()
    guidance = torch.tensor([4.0, 5.0]) if config.guidance_embeds else None
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    out = dit(noisy, condition, torch.tensor([120.0, 700.0]), guidance, mask, return_dict=False)[0]
    if not backward:
        return {"output": out.detach()}
    dit.zero_grad()
    (out * torch.randn(out.shape, generator=draw)).sum().backward()
    gradients = {name: p.grad for name, p in dit.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "noisy": noisy.grad, "condition": condition.grad, **gradients}


def three_steps(dit: SanaTransformer2DModel) -> None:
    # With a large eps, or rounding would decide about steps where the true gradient is nearly 0.
    optimizer = torch.optim.AdamW(dit.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-2)
    for seed in range(3):
        run(dit, seed)
        optimizer.step()


def merge(
    splits: Mapping[str, TensorSlice], mine: Mapping[str, Tensor], alike: bool = True
) -> dict[str, Tensor] | None:
    """On rank 0 the whole tensors from those of all ranks, NaN where no rank has an element; None elsewhere.

    What is not split is asserted to be the same on all ranks, bit for bit, if it is to be `alike`.
    """
    parts, digests = {}, {}
    for name, tensor in mine.items():
        place = splits.get(name, TensorSlice(name, tuple(tensor.shape)))
        if place.dim is None:
            digests[name] = hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy()).digest()
        else:
            parts[name] = place, tensor.detach()
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object((parts, digests), gathered)
    if gathered is None:
        return None
    whole = {name: mine[name].detach().clone() for name in digests}
    for _, other in gathered:
        assert other == digests or not alike, [name for name in digests if digests[name] != other[name]]
    for name, (place, tensor) in parts.items():
        whole[name] = torch.full(place.shape, torch.nan, dtype=tensor.dtype)
        for pieces, _ in gathered:
            place, piece = pieces[name]
            for begin, end, at in place.ranges:
                whole[name].narrow(place.dim, begin, end - begin).copy_(piece.narrow(place.dim, at, end - begin))
    return whole


def padding(splits: Mapping[str, TensorSlice], of: Sequence[Mapping[str, Tensor]]) -> tuple[int, float]:
    """(number, largest) of this rank's elements that stand in no range."""
    number, largest = 0, 0.0
    for name, place in splits.items():
        for tensors in of:
            if place.dim is None or name not in tensors:
                continue
            rows = tensors[name].detach().movedim(place.dim, 0)
            outside = torch.ones(len(rows), dtype=torch.bool)
            for begin, end, at in place.ranges:
                outside[at : at + end - begin] = False
            if outside.any():
                number += rows[outside].numel()
                largest = max(largest, float(rows[outside].abs().max()))
    return number, largest


def errors(found: Mapping[str, Tensor], true: Mapping[str, Tensor], zero: Sequence[str] = ()) -> dict[str, float]:
    """Largest difference by tensor, relative to its largest element, or to a thousandth of the largest of all tensors.

    zero: those that are truly 0, and by rounding something else; asserted to be nearly 0 and left out.
    """
    assert found.keys() == true.keys()
    sizes = {name: float(tensor.abs().max()) for name, tensor in true.items()}
    largest = max(sizes.values())
    assert all(max(sizes[name], float(found[name].abs().max())) < 1e-3 * largest for name in zero)
    return {
        name: float((found[name] - true[name]).abs().max()) / max(size, 1e-3 * largest)
        for name, size in sizes.items()
        if name not in zero
    }


def miss(found: Mapping[str, Tensor], true: Mapping[str, Tensor]) -> dict[str, float]:
    """Norm of the difference by tensor, relative to the norm of the true one."""
    return {name: float((found[name] - tensor).norm() / tensor.norm()) for name, tensor in true.items()}


def worst(errors: Mapping[str, float]) -> tuple[float, str]:
    """The largest of the errors, and of what it is; NaN counts as infinite."""
    return max((error if error == error else float("inf"), name) for name, error in errors.items())


@contextmanager
def all_reduces(skipped: int | None = None) -> Iterator[list[Tensor]]:
    """Yields a list that gets what every all-reduce was given; the one with the number `skipped` reduces nothing."""
    real, given = dist.all_reduce, []

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        given.append(tensor)
        return None if len(given) - 1 == skipped else real(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        yield given
    finally:
        dist.all_reduce = real
