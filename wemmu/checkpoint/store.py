"""Checkpoints: torch's distributed format under canonical names with a manifest, renamed into place.

    checkpoints/step_00001300/
        manifest.json     what is inside: modules, shapes, hashes of every file, step, data position, versions
        state/            DCP: model.<name>, exp_avg.<name>, exp_avg_sq.<name>, and ema.<name> where an average is kept

A checkpoint holds the weights that the stage trains, with their moments, and those it only carries from an earlier
stage. Names and shapes are those of the whole model, so any layout loads what any other saved. Frozen backbones are not
inside; the manifest records their identity. All ranks write under another name, on a shared file system; the directory
is renamed after its manifest is on disk, so a directory with the final name is whole.
"""

import os
import platform
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, Metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from wemmu.checkpoint.collective import CheckpointError, Ranks, all_ranks
from wemmu.checkpoint.exported import exported_tensors
from wemmu.checkpoint.finite import check_finite
from wemmu.checkpoint.manifest import FORMAT, Manifest, Origin, sha256_of, some, write_manifest
from wemmu.checkpoint.metadata import CheckedReader
from wemmu.checkpoint.retention import discard, make_room, newest
from wemmu.checkpoint.sharded_tensor import ShardedTensor, WholePlanner
from wemmu.checkpoint.state import TrainState
from wemmu.config.checkpoints import directory_name, no_averages
from wemmu.config.exported import is_export
from wemmu.config.files import sync

# One process is what `no_dist` asks for; torch warns of it at every save and load all the same.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

SHIPPED = "weights.safetensors"
LIBRARIES = ("torch", "transformers", "diffusers", "mosaicml-streaming")
WEIGHTS, MOMENTS, EMA = "model", ("exp_avg", "exp_avg_sq"), "ema"  # the first words of names in the state


def flat(state: TrainState, carried: Mapping[str, Tensor]) -> dict[str, ShardedTensor]:
    """Return everything that this rank holds, under its names in a checkpoint."""
    assert state.weights.keys() == state.exp_avg.keys() == state.exp_avg_sq.keys()
    assert state.ema.keys() in (set(), state.weights.keys())
    parts = {WEIGHTS: state.weights | dict(carried), "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
    parts |= {EMA: state.ema}
    return {f"{part}.{name}": ShardedTensor.of(tensor) for part, held in parts.items() for name, tensor in held.items()}


def save(root: Path, state: TrainState, carried: Mapping[str, Tensor], origin: Origin) -> Path:
    """Write the checkpoint of `state` and of carried weights under `root`; return its directory.

    All ranks call it, each with its tensors or parts.

    Raises:
        NotFiniteError: on all ranks, if one holds infinities or NaN.
        CheckpointError: on all ranks, if one cannot write or the parts do not add up to whole tensors.
    """
    return write(root, flat(state, carried), state.steps, origin, all_ranks())


def write(root: Path, tensors: dict[str, ShardedTensor], step: int, origin: Origin, ranks: Ranks) -> Path:
    """Save tensors by their names in the checkpoint; see `save`."""
    final = root / directory_name(step)
    aside = root / f"{final.name}.tmp"
    what = f"{final} was not written"
    check_finite(what, tensors, ranks)

    def begin(steps: list[int]) -> None:
        if len(set(steps)) > 1:
            raise CheckpointError(f"the ranks are at different steps: {steps}")
        discard(aside)
        aside.mkdir(parents=True)

    ranks.together(what, lambda: step, begin)
    try:
        metadata = dcp.save(
            tensors,
            # Copying ahead would open the first GPU in this thread; most of what comes is in host memory already.
            storage_writer=_Writer(aside / "state", per_thread_copy_ahead=0),
            planner=WholePlanner(),
            process_group=ranks.group,
            no_dist=ranks.group is None,
        )
    except CheckpointException as error:  # a BaseException in torch, so it would slip through every except Exception
        raise CheckpointError(f"{what}: {_reasons(error)}") from error

    def hashes() -> dict[str, str]:
        mine = sorted((aside / "state").glob(f"__{ranks.rank}_*"))
        mine += [aside / "state" / ".metadata"] if ranks.rank == 0 else []
        return {str(file.relative_to(aside)): sha256_of(file) for file in mine}

    ranks.together(what, hashes, lambda files: _finish(aside, final, _manifest(metadata, files, step, origin)))
    return final


class _Writer(FileSystemWriter):
    """Reports a failing disk, where torch only reports an unfinished archive."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _manifest(metadata: Metadata, files: list[dict[str, str]], step: int, origin: Origin) -> Manifest:
    shapes: dict[str, dict[str, list[int]]] = {part: {} for part in (WEIGHTS, *MOMENTS, EMA)}
    for key, stored in metadata.state_dict_metadata.items():
        part, _, name = key.partition(".")
        assert isinstance(stored, TensorStorageMetadata), "a checkpoint has tensors only"
        shapes[part][name] = list(stored.size)
    return Manifest(
        format=FORMAT,
        step=step,
        tensors=shapes[WEIGHTS],
        trained=sorted(shapes[MOMENTS[0]]),
        ema=bool(shapes[EMA]),
        files=dict(sorted(pair for mine in files for pair in mine.items())),
        libraries={"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        **asdict(origin),
    )


def _finish(aside: Path, final: Path, manifest: Manifest) -> None:
    """Rename what all ranks have written."""
    found = {str(file.relative_to(aside)) for file in aside.rglob("*") if file.is_file()}
    if found != manifest.files.keys():
        raise CheckpointError(
            f"{some(sorted(found ^ manifest.files.keys()))} is not seen by all ranks; the run folder must be on a file "
            "system that they share"
        )
    write_manifest(aside, manifest)
    for directory in (aside / "state", aside):
        sync(directory)
    make_room(final, manifest.step)
    os.replace(aside, final)
    # On the disk before older ones go.
    sync(final.parent)


def load_newest(
    root: Path, state: TrainState, check: Callable[[Path, Manifest], object] = lambda *_: None
) -> Manifest | None:
    """Load the newest whole checkpoint under `root`; None if there is no checkpoint.

    All ranks call it, each with its part of the live tensors, which are filled in place, whatever layout wrote them;
    carried weights are not read. An average that the checkpoint lacks starts with its weights; one that `state` does
    not keep is not read. check: raises on all ranks, before reading, if the checkpoint must not be used.

    Raises:
        CheckpointError: on all ranks, if there are checkpoints and none is whole; or naming the tensors that it lacks,
            does not know, has in other shapes than the ranks hold, or that are not finite.
    """
    ranks = all_ranks()
    found = newest(root, ranks)
    if found is None:
        return None
    check(*found)
    _fill(*found, state, ranks)
    check_finite(f"{found[0]} cannot be resumed from", flat(state, {}), ranks)
    return found[1]


def fill_weights(directory: Path, manifest: Manifest, into: Mapping[str, Tensor], ema: bool = False) -> None:
    """Read weights into live tensors, whole or `ShardedTensor`, of a checkpoint that `manifest` describes and verified.

    All ranks call it, each with what it holds of what is inside. ema: the averages of those that have one.

    Raises:
        CheckpointError: if averages are to be read and there are none.
    """
    prefixes = weight_prefixes(directory, manifest, ema)
    places = stored_weights(directory, manifest)
    if places is None:
        read(
            directory,
            {f"{prefixes[name]}.{name}": ShardedTensor.of(tensor) for name, tensor in into.items()},
            all_ranks(),
        )
    else:
        for path in sorted({places[name][0] for name in into}):
            with safe_open(path, framework="pt") as file:
                for name, tensor in into.items():
                    if places[name][0] != path:
                        continue
                    key = places[name][1]
                    for place, part in ShardedTensor.of(tensor).places:
                        part.copy_(file.get_slice(key)[place] if place else file.get_tensor(key))
    check_finite(f"{directory} cannot be used", into, all_ranks())


def stored_weights(directory: Path, manifest: Manifest) -> dict[str, tuple[Path, str]] | None:
    """Return name -> safetensors file and name there, of shipped weights or an export; None for a checkpoint (DCP)."""
    if (directory / SHIPPED).is_file():
        return {name: (directory / SHIPPED, name) for name in manifest.tensors}
    if not is_export(directory):
        return None
    held = exported_tensors(directory, manifest.frozen)
    return {name: (tensor.file, name.partition(".")[2]) for name, tensor in held.items()}


def weight_prefixes(directory: Path, manifest: Manifest, ema: bool) -> dict[str, str]:
    """Return the first word of each weight's name in the state; with `ema`, of its average if it has one.

    Raises:
        CheckpointError: if `ema` is set and there are no averages.
    """
    if ema and not manifest.ema:
        raise CheckpointError(no_averages(directory))
    averaged = set(manifest.trained) if ema else set()
    return {name: EMA if name in averaged else WEIGHTS for name in manifest.tensors}


def _fill(directory: Path, manifest: Manifest, state: TrainState, ranks: Ranks) -> None:
    continues = bool(state.ema) and manifest.ema
    tensors = flat(state if continues else replace(state, ema={}), {})
    parts = (WEIGHTS, *MOMENTS, *([EMA] if continues else []))
    held = {f"{part}.{name}": manifest.tensors[name] for part in parts for name in manifest.trained}

    def refuse(needed: list[dict[str, list[int]]]) -> None:
        names = set().union(*needed)
        lacking, unknown = sorted(names - held.keys()), sorted(held.keys() - names)
        if lacking or unknown:
            raise CheckpointError(
                f"{directory} is not of this model: it lacks {some(lacking)} and holds unknown {some(unknown)}"
            )
        for mine in needed:
            for name, shape in mine.items():
                if held[name] != shape:
                    raise CheckpointError(f"{directory}: {name} has shape {held[name]}, not {shape}")

    what = f"{directory} was not loaded"
    ranks.together(what, lambda: {name: list(tensor.shape) for name, tensor in tensors.items()}, refuse)
    read(directory, tensors, ranks)
    if not continues:
        state.begin_average()


def read(directory: Path, into: Mapping[str, Tensor], ranks: Ranks, reader: CheckedReader | None = None) -> None:
    """Fill tensors, whole or `ShardedTensor`, by their names in a checkpoint that was verified.

    reader: of the same checkpoint, where it is read from more than once.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        dcp.load(
            dict(into),
            storage_reader=reader or CheckedReader(directory / "state"),
            process_group=ranks.group,
            no_dist=ranks.group is None,
        )
    except CheckpointException as error:
        raise CheckpointError(f"{directory} cannot be read: {_reasons(error)}") from error


def _reasons(error: CheckpointException) -> str:
    failures = error.failures.items()
    return "; ".join(f"rank {rank}: {type(cause).__name__}: {cause}" for rank, (cause, _) in failures)
