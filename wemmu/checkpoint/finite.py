"""Rejects tensors with infinities or NaN when saving and loading: training cannot recover from them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from wemmu.checkpoint.collective import CheckpointError, Ranks
from wemmu.checkpoint.manifest import some
from wemmu.checkpoint.sharded_tensor import ShardedTensor


class NotFiniteError(CheckpointError):
    """A checkpoint whose tensors are not all finite."""


@torch.no_grad()
def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors (whole or `ShardedTensor`) with infinities or NaN in this rank's part."""
    parts = {name: [part for _, part in ShardedTensor.of(tensor).parts] for name, tensor in tensors.items()}
    # A sum is not finite if a summand is not, and takes no memory as `isfinite` does; a finite one may overflow.
    suspects = [name for name, of in parts.items() if not all(part.sum().isfinite() for part in of)]
    return [name for name in suspects if not all(part.isfinite().all() for part in parts[name])]


def check_finite(what: str, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Check that tensors are finite on all ranks; all `ranks` call it.

    Raises:
        NotFiniteError: "`what`: the names".
    """
    found = ranks.together(
        what, lambda: not_finite(tensors), lambda names: sorted({name for of in names for name in of})
    )
    if found:
        raise NotFiniteError(f"{what}: not finite are {some(found)}")


def narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert `tensor` to another dtype.

    Raises:
        NotFiniteError: if it holds values beyond the range of that type, which would become infinite.
    """
    made = tensor.to(dtype)
    if made.is_floating_point() and not_finite({name: made}) and not not_finite({name: tensor}):
        raise NotFiniteError(
            f"{name} holds values up to {tensor.abs().max():.3g}, beyond the range of "
            f"{str(dtype).removeprefix('torch.')}; give another --dtype: float32 or bfloat16"
        )
    return made
