"""The checkpoints of one folder: finds the newest, removes old ones, frees the name of a new one."""

import os
import shutil
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from wemmu.checkpoint.collective import ALONE, CheckpointError, Ranks
from wemmu.checkpoint.manifest import Manifest, verify
from wemmu.config.checkpoints import debris, manifest_step, own_checkpoints, refuse_renamed, stand_ins


def latest(root: Path) -> Path | None:
    """Return the newest checkpoint under `root`, or None. Changes nothing, because a run may be saving there.

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
    """Remove all but the newest `keep` checkpoints, after verifying the newest.

    step: the step just saved. Later checkpoints, which the resume skipped, do not count and stay. A checkpoint that
    cannot be removed stays and is printed.
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
    """Remove the remains of killed saves; only for the process that saves under `root`."""
    for left in debris(root):
        discard(left)


def newest(root: Path, ranks: Ranks) -> tuple[Path, Manifest] | None:
    """Return the newest whole checkpoint under `root`, the same on all ranks; None if there is no checkpoint.

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
            f"resume. Restore one of them; to start the stage again, move {root} away"
        )
    return whole


def _tell_stand_ins(root: Path) -> None:
    """Print links and files named like a checkpoint, for example a link to another disk."""
    for entry in stand_ins(root):
        kind = f"a link to {os.readlink(entry)}" if entry.is_symlink() else "a file"
        print(f"skipping {entry}: it is {kind}, and a checkpoint is a directory; move it here to use it", flush=True)


def newest_whole(directories: Sequence[Path], ranks: Ranks) -> tuple[Path, Manifest] | None:
    for directory in reversed(directories):
        try:
            return directory, verify(directory, ranks)
        except CheckpointError as error:
            if ranks.rank == 0:
                print(f"skipping a checkpoint: {error}", flush=True)
    return None


def make_room(directory: Path, step: int) -> None:
    """Free the name of the checkpoint of `step`: remove a link or a damaged checkpoint, rename anything else."""
    if directory.is_symlink():
        # Its target stays.
        directory.unlink()
    if not directory.exists():
        return
    if manifest_step(directory) == step:
        # Only a checkpoint that failed verification is written again (`newest` skips it).
        _remove(directory)
        return
    kept = next(p for n in count(1) if not (p := directory.with_name(f"{directory.name}.other-{n}")).exists())
    os.replace(directory, kept)
    print(f"{directory} held no checkpoint of step {step}; what it held is in {kept}", flush=True)


def _remove(directory: Path) -> None:
    """Remove a checkpoint; rename it first, so a kill leaves nothing partial under its name."""
    debris = directory.with_name(f"{directory.name}.old.tmp")
    try:
        discard(debris)
        os.replace(directory, debris)
    except OSError as error:
        print(f"{directory} cannot be removed and stays: {error}", flush=True)
        return
    discard(debris)


def discard(path: Path) -> None:
    """Remove a directory, a file or a link (never its target); print what cannot be removed."""
    try:
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)
    except OSError as error:
        print(f"{path} cannot be removed and stays: {error}", flush=True)
