"""Writes files atomically, and recognises file errors that another attempt would repeat."""

import errno
import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml
from yaml import CollectionEndEvent, CollectionStartEvent, ScalarEvent

from wemmu.config.base import ConfigError

# File system errors that persist until a person fixes them.
LASTING = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# OmegaConf's loader, which differs from PyYAML's own.
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# A path leads nowhere, cannot be one, or something else is there.
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
# The disk or its server fails, perhaps not for long.
FAULTS = (errno.EIO, errno.ESTALE)
# Levels of a config; no field is deeper than ten.
_DEEPEST = 50
_OTHER_BASE = re.compile(r"[-+]?(0[0-7_]+|[1-9][0-9_]*(:[0-5]?[0-9])+)")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in an OSError that names no file: those of writing and syncing do not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name to write under, which then becomes `path`: after a crash that is either the old or the new file.

    After an error the old file stays, and nothing new. Of processes that write `path` at once, the last one wins.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            yield aside
            sync(aside)
            os.replace(aside, path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise


def barely_begun(folder: Path, first: str, locks: Sequence[str]) -> bool:
    """Return whether a folder holds at most what a process leaves that is killed before its file `first` is written."""
    traces = (*locks, f"{first}.*tmp")
    return all(any(map(entry.match, traces)) for entry in folder.iterdir())


def nearest(path: Path) -> Path:
    """Return `path`, or the nearest of its parents that exists: where it would be created."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def replace_text(path: Path, text: str) -> None:
    """Replace the content of `path` atomically, see `replacing`."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def check_yaml(what: str, yaml_text: str | io.StringIO) -> None:
    """Refuse numbers of other bases, as YAML reads 010 as 8 and 1:30 as 90, and depths that crash the parser.

    Raises:
        ConfigError: "`what`: line N ...".
    """
    depth = 0
    for event in yaml.parse(yaml_text, YAML_LOADER):
        assert event.start_mark is not None, "an event that was read has a place"
        where = f"{what}: line {event.start_mark.line + 1}"
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > _DEEPEST:
            raise ConfigError(f"{where} is nested too deeply")
        if isinstance(event, ScalarEvent) and event.implicit[0] and _OTHER_BASE.fullmatch(event.value):
            raise ConfigError(
                f"{where}: YAML reads {event.value} as a number to the base 8 or 60; write it in digits without a "
                "leading 0, or in quotes if it is text"
            )
