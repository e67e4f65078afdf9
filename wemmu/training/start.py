"""Loads the weights that a stage starts with into the tensors, or parts, that this rank holds."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from wemmu.backbones.full_precision import Sources
from wemmu.checkpoint.collective import CheckpointError, all_ranks
from wemmu.checkpoint.manifest import Manifest, read_manifest, some, verify
from wemmu.checkpoint.sharded_tensor import ShardedTensor
from wemmu.checkpoint.store import fill_weights
from wemmu.config import StageRun
from wemmu.parallel.engine import Engine
from wemmu.published.identity import is_same, short
from wemmu.recipes.recipe import Recipe, identities


def begin(
    run: StageRun, made: Recipe, engine: Engine, resting: Collection[str]
) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Give an engine the weights that a stage starts with, in the full precision of their sources.

    resting: the names of what the stage could train and does not. Returns the weights that it only carries and
    the names of all that `stage.start` holds.

    Raises:
        CheckpointError: as `start_from`.
    """
    start, widens = run.stage.start, run.backbones.dtype != "float32"
    new = {name for name in resting if name.partition(".")[0] not in made.reports}
    if not widens and start is None:
        return engine.local_parameters(new), frozenset()
    held, masters = engine.local_parameters(resting), engine.state().weights
    inside = _names(start) if start else frozenset()
    carried = {name: tensor for name, tensor in held.items() if name in new | inside}
    if widens:
        # A copy in host memory, made once, because carried weights do not change.
        carried = {name: _wide(tensor) for name, tensor in carried.items()}
        fill_from(made.sources(), masters | carried)
    if start:
        start_from(start, held | masters, identities(made), also=carried if widens else {})
    engine.state().begin_average()
    engine.on_restore(0)
    return carried, inside


def _names(source: Path) -> frozenset[str]:
    """Read the weights in a checkpoint; an error on one rank is an error on all."""
    what = f"{source} cannot be started from"
    return all_ranks().together(what, lambda: frozenset(read_manifest(source).tensors), lambda found: found[0])


@torch.no_grad()
def fill_from(sources: Sources, into: Mapping[str, Tensor]) -> None:
    """Copy into live tensors, whole or `ShardedTensor`, what there is of them in `sources`, a part at a time."""
    for name in into.keys() & sources.keys():
        for offset, part in ShardedTensor.of(into[name]).parts:
            part.copy_(sources[name].read(tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))))


@torch.no_grad()
def _wide(tensor: Tensor) -> ShardedTensor:
    """A copy in float32 and in host memory."""
    placed = ShardedTensor.of(tensor)
    return ShardedTensor(
        placed.shape, [(offset, part.to("cpu", torch.float32, copy=True)) for offset, part in placed.parts]
    )


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
            "trained with another bridge (queries.design, vae_branch)?"
        )
    _check_frozen(source, manifest, frozen)
    for name, shape in manifest.tensors.items():
        if list(known[name]) != shape:
            raise CheckpointError(f"{source}: {name} has shape {shape}, not {list(known[name])}")


def _check_frozen(source: Path, manifest: Manifest, frozen: Mapping[str, str]) -> None:
    for part, sha256 in manifest.frozen.items():
        if not is_same(sha256, frozen[part]):
            raise CheckpointError(
                f"{source} was trained beside another {part} (SHA-256 {short(sha256)}, here {short(frozen[part])})"
            )
