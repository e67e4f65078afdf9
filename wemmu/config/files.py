"""Files that appear whole or not at all, and the errors of files that another attempt would meet again."""

import errno
import io
import os
import re
from pathlib import Path

import yaml
from yaml import CollectionEndEvent, CollectionStartEvent, ScalarEvent

from wemmu.config.base import ConfigError

# File system errors that persist until a person fixes them.
LASTING = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# OmegaConf's loader, which differs from PyYAML's own.
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# A path leads nowhere, or something else is there.
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
# Levels of a config; no field is deeper than ten.
_DEEPEST = 50
_OTHER_BASE = re.compile(r"[-+]?(0[0-7_]+|[1-9][0-9_]*(:[0-5]?[0-9])+)")


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Replace the content of `path` atomically: after a crash it is either the old or the new one."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


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
                "leading 0, or in quotes if it is a text"
            )
