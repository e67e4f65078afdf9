"""Files that appear whole or not at all, and the errors of files that another attempt would meet again."""

import errno
import os
from pathlib import Path

import yaml

# File system errors that persist until a person fixes them.
LASTING = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# OmegaConf's loader, which differs from PyYAML's own.
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# A path leads nowhere, or something else is there.
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


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
