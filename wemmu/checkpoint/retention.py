"""The checkpoints of one folder: which is the newest, which go, and what stands in the way of a new one."""

import os
import shutil
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from wemmu.checkpoint.collective import ALONE, CheckpointError, Ranks
from wemmu.checkpoint.manifest import Manifest, verify
from wemmu.config.checkpoints import debris, manifest_step, own_checkpoints, refuse_renamed, stand_ins


def latest(root: Path) -> Path | None:
    """The newest checkpoint under `root`; None if there is none. Changes nothing: a run may be saving there right now.

    Raises:
        CheckpointError: if it is damaged, naming the newest that is whole: whoever uses weights must know which.
        RenamedError: as `refuse_renamed`.
    """
    refuse_renamed(root)
    _tell_stand_ins(root)
    last = next(reversed(own_checkpoints(root)), None)
    try:
        if last is not None:
            verify(last)
    except CheckpointError as error:
        whole = newest_whole(own_checkpoints(root)[:-1], ALONE)
        instead = f"the newest that is whole is {whole[0]}" if whole else "none of the others is whole"
        raise CheckpointError(f"{error}. It is the newest of {root}; {instead}") from error
    return last


def prune(root: Path, keep: int, ranks: Ranks = ALONE, step: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints, and only once the newest verifies.

    step: the step just saved; later checkpoints, which the resume passed over, neither count nor change. One that
    cannot be removed stays, and is named.
    """

    def look(_: list[None]) -> list[Path]:
        # Without a readable manifest a directory may be anything.
        found = [(d, manifest_step(d)) for d in own_checkpoints(root)]
        return [d for d, said in found if said is not None and (step is None or said <= step)]

    directories = ranks.together(f"{root} cannot be read", lambda: None, look)

    def remove(_: list[None]) -> None:
        for directory in directories[:-keep]:
            _remove(directory)

    if len(directories) > keep:
        verify(directories[-1], ranks)
        ranks.together(f"{root} cannot be pruned", lambda: None, remove)


def clear_debris(root: Path) -> None:
    """Remove what a killed save left behind; for the one process that saves under `root`."""
    for left in debris(root):
        discard(left)


def newest(root: Path, ranks: Ranks) -> tuple[Path, Manifest] | None:
    """The newest whole checkpoint under `root`; None where there is no checkpoint at all. All ranks get the same.

    Raises:
        CheckpointError: if there are checkpoints and none is whole.
    """

    def look(_: list[None]) -> list[Path]:
        refuse_renamed(root)
        _tell_stand_ins(root)
        return own_checkpoints(root)

    found = ranks.together(f"{root} cannot be read", lambda: None, look)
    whole = newest_whole(found, ranks)
    if found and whole is None:
        raise CheckpointError(
            f"no checkpoint in {root} is whole ({', '.join(d.name for d in found)}; reasons above), so training cannot "
            f"resume. Restore one of them; to begin the stage anew on purpose, move {root} away"
        )
    return whole


def _tell_stand_ins(root: Path) -> None:
    """As where a checkpoint was moved to another disk and a link put in its place."""
    for entry in stand_ins(root):
        kind = f"a link to {os.readlink(entry)}" if entry.is_symlink() else "a file"
        print(
            f"passing over {entry}: it is {kind}, and a checkpoint is a directory; move it here to use it", flush=True
        )


def newest_whole(directories: Sequence[Path], ranks: Ranks) -> tuple[Path, Manifest] | None:
    for directory in reversed(directories):
        try:
            return directory, verify(directory, ranks)
        except CheckpointError as error:
            if ranks.rank == 0:
                print(f"passing over a checkpoint: {error}", flush=True)
    return None


def make_room(directory: Path, step: int) -> None:
    """Free the name of the checkpoint of `step`: a link or a damaged checkpoint goes, all else is renamed."""
    if directory.is_symlink():
        # Its target stays.
        directory.unlink()
    if not directory.exists():
        return
    if manifest_step(directory) == step:
        # Only one that failed verification is ever written again (`newest` passes over it).
        _remove(directory)
        return
    kept = next(p for n in count(1) if not (p := directory.with_name(f"{directory.name}.other-{n}")).exists())
    os.replace(directory, kept)
    print(f"{directory} held no checkpoint of step {step}; what it held is in {kept}", flush=True)


def _remove(directory: Path) -> None:
    """Remove a checkpoint so that, killed in the midst of it, nothing half removed bears its name."""
    debris = directory.with_name(f"{directory.name}.old.tmp")
    try:
        discard(debris)
        os.replace(directory, debris)
    except OSError as error:
        print(f"{directory} cannot be removed and stays: {error}", flush=True)
        return
    discard(debris)


def discard(path: Path) -> None:
    """Remove a directory, a file or a link (never its target); what cannot be removed stays, and is named."""
    try:
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)
    except OSError as error:
        print(f"{path} cannot be removed and stays: {error}", flush=True)
