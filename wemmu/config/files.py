"""Files that appear whole or not at all, and what to say where none can be written."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What ails a file system until somebody does something about it.
LASTING = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


@contextmanager
def said_plainly(code: int) -> Iterator[None]:
    """End the process with a sentence and `code` where a file system is full, read-only or somebody else's."""
    try:
        yield
    except OSError as error:
        if error.errno not in LASTING:
            raise
        print(f"a file cannot be read or written: {error}", file=sys.stderr)
        raise SystemExit(code) from error


def replace_text(path: Path, text: str) -> None:
    """Give `path` this content in one step: whatever crashes, the whole old content is there or the whole new."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
