"""Fills a model with the weights of a checkpoint, or of weights that `--ship` wrote."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from wemmu.checkpoint.adapters import A, add_merged, is_adapter, scale_of, to_merge
from wemmu.checkpoint.collective import CheckpointError, all_ranks
from wemmu.checkpoint.exported import is_own
from wemmu.checkpoint.manifest import Manifest, some, verify
from wemmu.checkpoint.sharded_tensor import ShardedTensor
from wemmu.checkpoint.store import fill_weights
from wemmu.published.identity import is_same, short
from wemmu.readable import listed


@torch.no_grad()
def start_from(
    source: Path,
    held: Mapping[str, Tensor],
    frozen: Mapping[str, str],
    ema: bool = False,
    also: Mapping[str, Tensor] = MappingProxyType({}),
    scales: Mapping[str, float] = MappingProxyType({}),
    widened: Collection[str] = (),
) -> frozenset[str]:
    """Fill `held` with the weights of a checkpoint, or of one that was shipped; return the names of what it determines.

    held: what this rank holds of all that is `startable`, live, by canonical name; all ranks call it. frozen:
    backbone -> SHA-256 of the weights that it was loaded with; without `vae`, any will do. ema: whether the averages of
    the weights are meant. also: further tensors, for some of the same weights. scales: how the names of adapted layers
    begin -> alpha / rank. widened: names of weights [D, 2 C, ...] that a checkpoint may hold as [D, C, ...]; the
    further channels begin with zeros.
    What no backbone gave must be inside whole. A backbone's weights that are not inside were frozen when the checkpoint
    was made, so they must have been those of the very backbone that is loaded now. Adapters go on learning where the
    model has the same ones, and are merged where it has none.

    Raises:
        CheckpointError: naming the tensors that are missing, unknown or of another shape, or the frozen part that
            differs; or saying that there are no averages.
    """
    manifest = verify_start(source, held, frozen, scales, widened)
    fill_merged(source, manifest, held, held, ema)
    if also:
        fill_merged(source, manifest, also, held, ema)
    return determined(manifest, held)


def verify_start(
    source: Path,
    held: Mapping[str, Tensor],
    frozen: Mapping[str, str],
    scales: Mapping[str, float] = MappingProxyType({}),
    widened: Collection[str] = (),
) -> Manifest:
    """Return the manifest of a checkpoint that `start_from` can fill `held` from; arguments and errors as there."""
    ranks = all_ranks()
    manifest = verify(source, ranks)

    def check(shapes: list[dict[str, list[int]]]) -> None:
        known = {name: shape for mine in shapes for name, shape in mine.items()}
        check_fits(source, manifest, known, frozen, scales, widened)

    ranks.together(f"{source} cannot be started from", lambda: {n: list(t.shape) for n, t in held.items()}, check)
    return manifest


def determined(manifest: Manifest, known: Collection[str]) -> frozenset[str]:
    """Return the names of the weights `known` that a checkpoint gives their values, alone or by its adapters."""
    return frozenset(manifest.tensors.keys() | to_merge(manifest.tensors, known).keys())


def fill_merged(
    source: Path, manifest: Manifest, into: Mapping[str, Tensor], known: Collection[str], ema: bool = False
) -> None:
    """Read weights as `fill_weights`, and merge adapters into weights that `into` holds; all ranks call it.

    known: names of all weights of the model; adapters among them are not merged.
    """
    inside = sorted(into.keys() & manifest.tensors.keys())
    narrow = {n: torch.empty(manifest.tensors[n]) for n in inside if manifest.tensors[n] != list(into[n].shape)}
    fill_weights(source, manifest, {name: narrow.get(name, into[name]) for name in inside}, ema)
    for name, weight in narrow.items():
        whole = torch.zeros(into[name].shape)
        whole[:, : weight.shape[1]] = weight
        for place, part in ShardedTensor.of(into[name]).places:
            part.copy_(whole[place])
    merging = {name: pair for name, pair in to_merge(manifest.tensors, known).items() if name in into}
    adapters = {name: torch.empty(manifest.tensors[name]) for pair in merging.values() for name in pair}
    if adapters:
        fill_weights(source, manifest, adapters, ema)
    for name, (a, b) in merging.items():
        scale = scale_of(name, manifest.adapters)
        assert scale is not None, "checked"
        add_merged(into[name], adapters[a], adapters[b], scale)


def check_fits(
    source: Path,
    manifest: Manifest,
    known: Mapping[str, Sequence[int]],
    frozen: Mapping[str, str],
    scales: Mapping[str, float] = MappingProxyType({}),
    widened: Collection[str] = (),
) -> None:
    """Refuse a checkpoint that a stage whose startable weights have the shapes `known` cannot start from.

    Raises:
        CheckpointError: as `start_from`.
    """
    _check_adapters(source, manifest, known, scales)
    merging = to_merge(manifest.tensors, known)
    copied = tuple(manifest.copied)
    # What is not inside was not trained, so it is the backbone's, which `_check_frozen` compares. Adapters that are not
    # inside are new.
    needed = {
        n for n in known
        if n.partition(".")[0] not in manifest.frozen and not n.startswith(copied) and not is_adapter(n)
    }  # fmt: skip
    merged = {name for pair in merging.values() for name in pair}
    missing = sorted(needed - manifest.tensors.keys())
    unknown = sorted(manifest.tensors.keys() - known.keys() - merged | merging.keys() - known.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{source} does not fit this stage: it lacks {some(missing)} and holds unknown {some(unknown)}. Was it "
            "trained with another bridge (queries.design, vae_branch, states)?"
        )
    _check_frozen(source, manifest, frozen)
    for name, shape in manifest.tensors.items():
        wider = [shape[0], 2 * shape[1], *shape[2:]] if name in widened else shape
        if name not in merged and list(known[name]) not in (shape, wider):
            raise CheckpointError(f"{source}: {name} has shape {shape}, not {list(known[name])}")
    for name, (a, b) in merging.items():
        if list(known[name]) != [manifest.tensors[b][0], manifest.tensors[a][1]]:
            raise CheckpointError(f"{source}: the adapters of {name} are not of its shape {list(known[name])}")


def _check_adapters(
    source: Path, manifest: Manifest, known: Mapping[str, Sequence[int]], scales: Mapping[str, float]
) -> None:
    """Check that adapters continue unchanged, or are all merged."""
    for prefix in manifest.adapters.keys() & scales.keys():
        inside, here = (
            {name: list(shape) for name, shape in shapes.items() if name.startswith(prefix) and is_adapter(name)}
            for shapes in (manifest.tensors, known)
        )
        was, now = manifest.adapters[prefix], scales[prefix]
        if inside == here and was == now:
            continue
        rank, own = (
            listed(sorted({str(shape[0]) for name, shape in shapes.items() if name.endswith(A)}))
            for shapes in (inside, here)
        )
        more, fewer = sorted(inside.keys() - here.keys()), sorted(here.keys() - inside.keys())
        odd = sorted(name for name in inside.keys() & here.keys() if inside[name] != here[name])
        differ = [
            f"rank {rank}, here {own}" * (rank != own),
            f"alpha / rank {was:g}, here {now:g}" * (was != now),
            f"this stage has no {some(more)}" * bool(more),
            f"it has no {some(fewer)}" * bool(fewer),
            f"other shapes of {some(odd)}" * (rank == own and bool(odd)),
        ]
        raise CheckpointError(
            f"{source} holds other adapters (LoRA) of {prefix}* than recipe.lora: {'; '.join(filter(None, differ))}. A "
            f"stage can only continue the same adapters; set rank {rank} and alpha / rank {was:g} for the same "
            "layers there, or merge them with `wemmu export` and start from the export"
        )


def _check_frozen(source: Path, manifest: Manifest, frozen: Mapping[str, str]) -> None:
    for part, sha256 in manifest.frozen.items():
        if part == "vae" and part not in frozen:
            continue
        # The folder of the very export was compared with its source when it was written, and may be of another type.
        if not is_same(sha256, frozen[part]) and not is_own(source, part, getattr(frozen[part], "directory", None)):
            raise CheckpointError(
                f"{source} was trained with another {part} (SHA-256 {short(sha256)}, here {short(frozen[part])})"
                + "; if both compute the same latents, set start_other_vae=true in the stage" * (part == "vae")
            )
