"""Fills a model with the weights of a checkpoint, or of one that was shipped."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from wemmu.checkpoint.collective import CheckpointError, all_ranks
from wemmu.checkpoint.exported import is_own
from wemmu.checkpoint.manifest import Manifest, some, verify
from wemmu.checkpoint.store import fill_weights
from wemmu.published.identity import is_same, short


@torch.no_grad()
def start_from(
    source: Path,
    held: Mapping[str, Tensor],
    frozen: Mapping[str, str],
    ema: bool = False,
    also: Mapping[str, Tensor] = MappingProxyType({}),
) -> frozenset[str]:
    """Fill `held` with the weights of a checkpoint, or of one that was shipped; returns the names of what is in it.

    held: what this rank holds of all that is `startable`, live, by canonical name; all ranks call it. frozen:
    backbone -> SHA-256 of the weights that it was loaded with. ema: whether the averages of the weights are meant.
    also: further tensors, for some of the same weights.
    What no backbone gave must be inside whole. A backbone's weights that are not inside were frozen when the checkpoint
    was made, so they must have been those of the very backbone that is loaded now.

    Raises:
        CheckpointError: naming the tensors that are missing, unknown or of another shape, or the frozen part that
            differs; or saying that there are no averages.
    """
    ranks = all_ranks()
    manifest = verify(source, ranks)

    def check(shapes: list[dict[str, list[int]]]) -> None:
        check_fits(source, manifest, {name: shape for mine in shapes for name, shape in mine.items()}, frozen)

    ranks.together(f"{source} cannot be started from", lambda: {n: list(t.shape) for n, t in held.items()}, check)
    fill_weights(source, manifest, {name: tensor for name, tensor in held.items() if name in manifest.tensors}, ema)
    if also:
        fill_weights(source, manifest, {name: tensor for name, tensor in also.items() if name in manifest.tensors}, ema)
    return frozenset(manifest.tensors)


def check_fits(source: Path, manifest: Manifest, known: Mapping[str, Sequence[int]], frozen: Mapping[str, str]) -> None:
    """Refuse a checkpoint that a stage whose startable weights have the shapes `known` cannot start from.

    Raises:
        CheckpointError: as `start_from`.
    """
    # What is not inside was not trained, so it is the backbone's, which `_check_frozen` compares.
    needed = {n for n in known if n.partition(".")[0] not in manifest.frozen}
    missing, unknown = sorted(needed - manifest.tensors.keys()), sorted(manifest.tensors.keys() - known.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{source} does not fit this stage: it lacks {some(missing)} and holds unknown {some(unknown)}. Was it "
            "trained with another bridge (queries.design, vae_branch, states)?"
        )
    _check_frozen(source, manifest, frozen)
    for name, shape in manifest.tensors.items():
        if list(known[name]) != shape:
            raise CheckpointError(f"{source}: {name} has shape {shape}, not {list(known[name])}")


def _check_frozen(source: Path, manifest: Manifest, frozen: Mapping[str, str]) -> None:
    for part, sha256 in manifest.frozen.items():
        # The folder of the very export was compared with its source when it was written, and may be of another type.
        if not is_same(sha256, frozen[part]) and not is_own(source, part, getattr(frozen[part], "directory", None)):
            raise CheckpointError(
                f"{source} was trained with another {part} (SHA-256 {short(sha256)}, here {short(frozen[part])})"
            )
