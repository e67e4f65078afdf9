"""How a stage begins: with the weights that another one left, read into whatever this one holds of them."""

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from wemmu.config.stage import WEIGHTS
from wemmu.published.identity import is_same, short
from wemmu.training.checkpoint import fill_weights
from wemmu.training.collective import CheckpointError, all_ranks
from wemmu.training.manifest import Manifest, some, verify

STARTABLE = ("bridge.", *chain.from_iterable(WEIGHTS.values()))


def startable(model: nn.Module) -> dict[str, Tensor]:
    """The live weights of a whole model that a stage can leave behind, by canonical name."""
    return {name: p.detach() for name, p in model.named_parameters() if name.startswith(STARTABLE)}


@torch.no_grad()
def start_from(
    source: Path, held: Mapping[str, Tensor], identities: Mapping[str, str], ema: bool = False
) -> frozenset[str]:
    """Fill `held` with the weights of a checkpoint, or of one that was shipped; returns the names of what is in it.

    held: what this rank holds of all that is `startable`, live, by canonical name; all ranks call it. identities:
    backbone -> SHA-256 of the weights that it was loaded with. ema: whether the averages of the weights are meant.
    What no backbone gave must be inside whole. A backbone's weights that are not inside were frozen when the checkpoint
    was made, so they must have been those of the very backbone that is loaded now.

    Raises:
        CheckpointError: naming the tensors that are missing, unknown or of another shape, or the frozen part that
            differs; or saying that there are no averages.
    """
    ranks = all_ranks()
    manifest = verify(source, ranks)

    def check(shapes: list[dict[str, list[int]]]) -> None:
        check_fits(source, manifest, {name: shape for mine in shapes for name, shape in mine.items()}, identities)

    ranks.together(f"{source} cannot be started from", lambda: {n: list(t.shape) for n, t in held.items()}, check)
    fill_weights(source, manifest, {name: tensor for name, tensor in held.items() if name in manifest.tensors}, ema)
    return frozenset(manifest.tensors)


def check_fits(
    source: Path, manifest: Manifest, known: Mapping[str, Sequence[int]], identities: Mapping[str, str]
) -> None:
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
    _check_frozen(source, manifest, identities)
    for name, shape in manifest.tensors.items():
        if list(known[name]) != shape:
            raise CheckpointError(f"{source}: {name} has shape {shape}, not {list(known[name])}")


def _check_frozen(source: Path, manifest: Manifest, identities: Mapping[str, str]) -> None:
    for part, sha256 in manifest.frozen.items():
        if not is_same(sha256, identities[part]):
            raise CheckpointError(
                f"{source} was trained beside another {part} (SHA-256 {short(sha256)}, here {short(identities[part])})"
            )
