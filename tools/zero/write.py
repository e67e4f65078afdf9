"""A folder of DeepSpeed -> a checkpoint of this system: streamed, read again, compared, and only then named."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from tools.export.report import ParityError
from tools.export.skeleton import identities, shapes, skeleton
from tools.export.stored import sha256_of_tensor
from tools.zero.folder import Folder
from tools.zero.names import rename
from tools.zero.partitions import MOMENTS, WEIGHT, Parameter
from tools.zero.pickles import FolderError
from wemmu.checkpoint.collective import ALONE
from wemmu.checkpoint.manifest import Origin, some
from wemmu.checkpoint.placed import Placed
from wemmu.checkpoint.store import directory_name, write
from wemmu.checkpoint.stored import StoredTensors
from wemmu.config import StageRun

REPORT = "parity.json"


class Unread(Placed):
    """A whole tensor that is read when it is written, and not kept."""

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], read: Callable[[], Tensor]) -> "Unread":
        tensor = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)
        tensor.parts, tensor.read = [], read
        return tensor

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size([0] * self.ndim), self.size())]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.read()


class OneAtATime:
    """Lets go of the values it gave before it reads the next.

    DCP's writer keeps every tensor that it was given until its file is closed (torch 2.12), though it has been written.
    """

    def __init__(self) -> None:
        self._given: Tensor | None = None

    def __call__(self, read: Callable[[], Tensor]) -> Tensor:
        if self._given is not None:
            self._given.untyped_storage().resize_(0)
        self._given = read()
        return self._given


def write_checkpoint(folder: Folder, run: StageRun, root: Path, table: Mapping[str, str]) -> list[str]:
    """Write what `folder` holds as a checkpoint of the stage `run` under `root`; returns the summary of its parity.

    table: see `tools.zero.names.rename`. Memory holds one tensor at a time.

    Raises:
        FolderError: naming parameters that the stage lacks, does not know, or has in other shapes.
        ParityError: if what was written is not what the folder holds.
    """
    canonical = rename(folder.parameters, table)
    found = {new: folder.parameters[old] for old, new in canonical.items() if new is not None}
    left_out = [old for old, new in canonical.items() if new is None]
    _check(found, shapes(skeleton(run)), [old for old in left_out if folder.parameters[old].trained])
    frozen = identities(run)
    if any(name.startswith("dit.") for name in found):
        # What is inside is no longer the backbone of that name.
        del frozen["dit"]
    final, aside = root / directory_name(folder.step), root / f"{directory_name(folder.step)}.import.tmp"
    if final.exists():
        raise FolderError(f"{final} is there already, so it is left alone; give another --checkpoint")
    tensors = _tensors(found, folder.has_moments)
    one_at_a_time = OneAtATime()
    shutil.rmtree(aside, ignore_errors=True)
    try:
        origin = Origin(run.stage.name, run.seed, run.stage.resolution, frozen, {"engine": folder.made_by})
        written = write(
            aside,
            {
                f"{part}.{name}": Unread(each.shape, partial(one_at_a_time, partial(each.read, part)))
                for part, name, each in tensors
            },
            folder.step,
            origin,
            ALONE,
        )
        report = _compare(written, tensors) | {
            "folder": folder.made_by,
            "step": folder.step,
            "names": {new: old for old, new in canonical.items() if new is not None},
            "left_out": left_out,
            "moments": folder.has_moments,
            "origin": asdict(origin),
            "outputs": {"compared": False, "reason": "a DeepSpeed folder holds weights and no model that could be run"},
        }
        (written / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        os.replace(written, final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return _lines(folder, final, found, left_out)


def _check(found: Mapping[str, Parameter], needed: Mapping[str, list[int]], trained_left_out: list[str]) -> None:
    with_dit = any(name.startswith("dit.") for name in found)
    missing = sorted(name for name in needed.keys() - found.keys() if with_dit or name.startswith("bridge."))
    unexpected = sorted(found.keys() - needed.keys())
    if missing or unexpected:
        raise FolderError(
            f"the folder does not fit this stage: missing {some(missing)}, unexpected {some(unexpected)}. Names are "
            "those of this system's bridge.* and dit.*; --rename OLD=NEW gives another prefix, OLD=- leaves out"
        )
    for name, parameter in found.items():
        if list(parameter.shape) != needed[name]:
            raise FolderError(f"{name} has shape {list(parameter.shape)} in the folder, {needed[name]} in this stage")
    if trained_left_out:
        raise FolderError(
            f"--rename leaves out {some(trained_left_out)}, which was trained; only what is frozen may go"
        )


def _tensors(found: Mapping[str, Parameter], moments: bool) -> list[tuple[str, str, Parameter]]:
    """All that is written: (part, name, parameter), parts by the first word of their names in a checkpoint."""
    return [
        (part, name, each)
        for name, each in found.items()
        for part in (WEIGHT, *(MOMENTS if moments and each.trained else ()))
    ]


def _compare(written: Path, tensors: list[tuple[str, str, Parameter]]) -> dict[str, Any]:
    """Read every tensor again, from the checkpoint and from the folder; returns their hashes.

    Raises:
        ParityError: naming the first that differs.
    """
    stored = StoredTensors(written)
    notes: dict[str, dict[str, Any]] = {}
    for part, name, each in tensors:
        digest = sha256_of_tensor(each.read(part))
        if sha256_of_tensor(stored.read(name, part)) != digest:
            raise ParityError(f"{part} of {name} was written with other values than the folder's")
        types = {str(values.dtype).removeprefix("torch.") for values in each.parts[part]}
        notes[f"{part}.{name}"] = {
            "shape": list(each.shape),
            "dtype": "float32",
            "from": sorted(types),
            "sha256": digest,
        }
    return {"tensors": notes, "libraries": stored.manifest.libraries}


def _lines(folder: Folder, final: Path, found: Mapping[str, Parameter], left_out: list[str]) -> list[str]:
    trained = [each for each in found.values() if each.trained]
    rows = [f"{folder.made_by}, step {folder.step} -> {final}", f"{'':10}{'tensors':>8}{'parameters':>15}"]
    for what, group in (("trained", trained), ("frozen", [each for each in found.values() if not each.trained])):
        rows.append(f"{what:10}{len(group):8}{sum(torch.Size(each.shape).numel() for each in group):15,}")
    goes_on = "Adam's moments are inside" if folder.has_moments else "no moments: it can start a stage, not resume one"
    return [
        *rows,
        f"0 missing, 0 unexpected, {len(left_out)} left out by --rename; {goes_on}",
        "every tensor was read again from disk and equals the folder's, bit for bit",
    ]
