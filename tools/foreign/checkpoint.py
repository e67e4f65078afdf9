"""A folder of another framework -> a checkpoint of this system: streamed, read again, compared, then renamed."""

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from tools.export.report import compare_tensors
from tools.export.skeleton import identities, shapes, skeleton
from tools.export.stored import Stored
from tools.foreign.folder import Folder, FolderError, Parameter
from wemmu.checkpoint.collective import ALONE
from wemmu.checkpoint.manifest import Origin, some
from wemmu.checkpoint.sharded_tensor import ShardedTensor
from wemmu.checkpoint.store import MOMENTS, WEIGHTS, write
from wemmu.checkpoint.stored import StoredTensors
from wemmu.config import StageRun
from wemmu.config.checkpoints import directory_name

REPORT = "parity.json"
# In the place of a new prefix: all that begins with the old one is left out.
LEFT_OUT = "-"


class Unread(ShardedTensor):
    """A whole tensor that is read when it is written, and not kept."""

    read: Callable[[], Tensor]

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
    """Frees a tensor's values before it reads the next tensor.

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

    table: see `rename`. Memory holds one tensor at a time.

    Raises:
        FolderError: naming parameters that the stage lacks, does not know, or has in other shapes.
        ParityError: if what was written is not what the folder holds.
    """
    canonical = rename(folder.parameters, table)
    found = {new: folder.parameters[old] for old, new in canonical.items() if new is not None}
    left_out = [old for old, new in canonical.items() if new is None]
    _check(
        found, run.recipe.backbones, shapes(skeleton(run)), [old for old in left_out if folder.parameters[old].trained]
    )
    # A backbone with weights inside is no longer the one of that name.
    frozen = {name: sha256 for name, sha256 in identities(run).items() if name not in _parts(found)}
    final, aside = root / directory_name(folder.step), root / f"{directory_name(folder.step)}.import.tmp"
    if final.exists():
        raise FolderError(f"{final} exists and stays unchanged; give another --checkpoint")
    sources = _sources(found, folder.has_moments)
    one_at_a_time = OneAtATime()
    shutil.rmtree(aside, ignore_errors=True)
    try:
        origin = Origin(run.stage.name, run.seed, run.stage.resolution, frozen, {"engine": folder.made_by})
        written = write(
            aside,
            {key: Unread(each.shape, partial(one_at_a_time, each.read)) for key, each in sources.items()},
            folder.step,
            origin,
            ALONE,
        )
        report = _compare(written, sources, found) | {
            "folder": folder.made_by,
            "step": folder.step,
            "names": {new: old for old, new in canonical.items() if new is not None},
            "left_out": left_out,
            "moments": folder.has_moments,
            "origin": asdict(origin),
            "outputs": {"compared": False, "reason": "the folder holds weights and no model that could be run"},
        }
        (written / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        os.replace(written, final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return _lines(folder, final, found, left_out)


def _parts(names: Iterable[str]) -> set[str]:
    """The first words of canonical names; a backbone's is its field of `backbones`."""
    return {name.partition(".")[0] for name in names}


def _check(
    found: Mapping[str, Parameter],
    backbones: Collection[str],
    needed: Mapping[str, list[int]],
    trained_left_out: list[str],
) -> None:
    # A backbone that the folder does not hold was not trained.
    absent = set(backbones) - _parts(found)
    missing = sorted(name for name in needed.keys() - found.keys() if not _parts([name]) & absent)
    unexpected = sorted(found.keys() - needed.keys())
    if missing or unexpected:
        raise FolderError(
            f"the folder does not fit this stage: missing {some(missing)}, unexpected {some(unexpected)}. Names are "
            f"those of this system's {' and '.join(f'{part}.*' for part in sorted(_parts(needed)))}; --rename OLD=NEW "
            "gives another prefix, OLD=- leaves out"
        )
    for name, parameter in found.items():
        if list(parameter.shape) != needed[name]:
            raise FolderError(f"{name} has shape {list(parameter.shape)} in the folder, {needed[name]} in this stage")
    if trained_left_out:
        raise FolderError(
            f"--rename leaves out {some(trained_left_out)}, which was trained; only what is frozen may go"
        )


def _sources(found: Mapping[str, Parameter], moments: bool) -> dict[str, Stored]:
    """All that is written, by its name in a checkpoint: part.name, where the part is that of `Parameter.parts`."""
    return {
        f"{part}.{name}": replace(each.parts[part], dtype=torch.float32)
        for name, each in found.items()
        for part in (WEIGHTS, *(MOMENTS if moments and each.trained else ()))
    }


def _compare(written: Path, sources: Mapping[str, Stored], found: Mapping[str, Parameter]) -> dict[str, Any]:
    """Read every tensor again, from the checkpoint and from the folder; returns what there is to say of each."""
    stored = StoredTensors(written)
    read = {}
    for key, source in sources.items():
        part, _, name = key.partition(".")
        read[key] = replace(source, read=partial(stored.read, name, part))
    notes, _ = compare_tensors("the checkpoint", read, sources, torch.float32)
    for key, note in notes.items():
        part, _, name = key.partition(".")
        note["from"] = [str(found[name].parts[part].dtype).removeprefix("torch.")]
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


def rename(names: Iterable[str], table: Mapping[str, str]) -> dict[str, str | None]:
    """Return name -> canonical name, None for dropped names. The longest prefix counts; without one the name stays.

    A rule leaves out what begins with OLD if NEW is `-`; any other NEW takes the place of OLD.

    Raises:
        ValueError: if two names become one, or a rule fits no name.
    """
    found: dict[str, str | None] = {}
    taken: dict[str, str] = {}
    used = set()
    for name in names:
        fitting = max((old for old in table if name.startswith(old)), key=len, default=None)
        if fitting is None:
            new: str | None = name
        else:
            used.add(fitting)
            new = None if table[fitting] == LEFT_OUT else table[fitting] + name.removeprefix(fitting)
        if new is not None and taken.setdefault(new, name) != name:
            raise ValueError(f"--rename makes {new} of both {taken[new]} and {name}")
        found[name] = new
    if idle := sorted(table.keys() - used):
        raise ValueError(f"--rename {idle[0]}=... fits no name; the first are {', '.join(list(found)[:3])}")
    return found
