"""Files that appear whole or not at all, and the errors of files that another attempt would meet again."""

import errno
import os
from pathlib import Path

# What ails a file system until somebody does something about it.
LASTING = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
# A path leads nowhere.
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


def replace_text(path: Path, text: str) -> None:
    """Give `path` this content in one step: whatever crashes, the whole old content is there or the whole new."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
