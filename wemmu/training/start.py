"""Loads the initial weights of a stage into the tensors, or parts of tensors, that this rank holds."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from wemmu.backbones.full_precision import Sources
from wemmu.checkpoint.adapters import is_adapter
from wemmu.checkpoint.collective import all_ranks
from wemmu.checkpoint.exported import is_own
from wemmu.checkpoint.manifest import read_manifest
from wemmu.checkpoint.sharded_tensor import ShardedTensor
from wemmu.checkpoint.start import determined, fill_merged, start_from
from wemmu.config import StageRun
from wemmu.config.exported import FOLDERS
from wemmu.parallel.engine import Engine
from wemmu.recipes.recipe import Recipe, identities


def begin(
    run: StageRun, made: Recipe, engine: Engine, resting: Collection[str], inside: Collection[str]
) -> dict[str, Tensor]:
    """Give an engine the weights that a stage starts with, in the full precision of their sources.

    resting: the names of what the stage could train and does not. inside: see `names_inside`. Returns the weights that
    it only carries.

    Raises:
        CheckpointError: as `start_from`.
    """
    # Weights in 8 or 4 bit have their source beside them, too.
    start, widens = run.stage.start, run.backbones.dtype != "float32" or bool(run.memory.quantize)
    copies = copies_of(run, made)
    new = {
        name for name in resting
        if name.partition(".")[0] not in made.reports and (is_adapter(name) or not name.startswith(tuple(copies)))
    }  # fmt: skip
    if not widens and start is None:
        return engine.local_parameters(new)
    held, masters = engine.local_parameters(resting), engine.state().weights
    carried = {name: tensor for name, tensor in held.items() if name in new.union(inside)}
    if widens:
        # A copy in host memory, made once, because carried weights do not change.
        carried = {name: _wide(tensor) for name, tensor in carried.items()}
        fill_from(made.sources(), masters | carried)
        fill_named(made, masters | carried)
    if start:
        beside = {part: one for part, one in identities(made).items() if part != "vae" or not run.stage.start_other_vae}
        also = carried if widens else {}
        start_from(start, held | masters, beside, also=also, scales=made.model.scales, widened=made.widened())
    engine.state().begin_average()
    engine.on_restore(0)
    return carried


def fill_named(made: Recipe, into: Mapping[str, Tensor]) -> None:
    """Fill live tensors from the checkpoints that the recipe's config names; all ranks call it.

    The model was built with their weights, but in the type that it computes in.
    """
    for prefix, source in made.checkpoints.items():
        own = {n.removeprefix(prefix): t for n, t in into.items() if n.startswith(prefix) and not is_adapter(n)}
        if own:
            fill_merged(source, read_manifest(source), own, own)


def fill_empty(made: Recipe, engine: Engine, names: set[str]) -> None:
    """Read the weights that were left on the meta device: of each one the part that this rank holds."""
    sources = made.sources(every=True)
    assert names <= sources.keys(), f"no file holds {sorted(names - sources.keys())[:5]}"
    fill_from({name: sources[name] for name in names}, engine.local_parameters(names))
    engine.state().begin_average()
    engine.on_restore(0)


def copies_of(run: StageRun, made: Recipe) -> dict[str, str]:
    """Return how the names of weights begin that adapters leave what they were, a backbone's -> the backbone."""
    return {prefix: backbone for prefix, backbone in run.recipe.copies.items() if prefix in made.model.scales}


def names_inside(run: StageRun, known: Collection[str]) -> frozenset[str]:
    """Read the names of the weights that the stage's start determines, but for a backbone's own.

    known: those of all that stages can train. An export may be the backbones as well: what is not trained need not be
    carried then. An error on one rank is an error on all.
    """
    source = run.stage.start
    if source is None:
        return frozenset()
    own = tuple(f"{part}." for part in FOLDERS if is_own(source, part, getattr(run.backbones, part)))
    what = f"{source} cannot be started from"
    return all_ranks().together(
        what,
        lambda: frozenset(n for n in determined(read_manifest(source), known) if not n.startswith(own)),
        lambda found: found[0],
    )


@torch.no_grad()
def fill_from(sources: Sources, into: Mapping[str, Tensor]) -> None:
    """Copy into live tensors, whole or `ShardedTensor`, what there is of them in `sources`, a part at a time."""
    for name in into.keys() & sources.keys():
        for place, part in ShardedTensor.of(into[name]).places:
            part.copy_(sources[name].read(place))


@torch.no_grad()
def _wide(tensor: Tensor) -> ShardedTensor:
    """A copy in float32 and in host memory."""
    placed = ShardedTensor.of(tensor)
    return ShardedTensor(
        placed.shape, [(offset, part.to("cpu", torch.float32, copy=True)) for offset, part in placed.parts]
    )
