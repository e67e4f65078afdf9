"""The files that a source names, on any filesystem that fsspec opens, and what can be told of them at a glance."""

import posixpath
from dataclasses import dataclass
from typing import IO

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from data_pipeline.records import SourcePartition
from wemmu.config import ConfigError
from wemmu.config.patterns import escaped, expanded

# What `git clone` leaves in the place of a large file that it did not fetch.
_LFS = b"version https://git-lfs.github.com/spec/"
# Bytes of the longest file that is opened to see whether it is one.
_LFS_BYTES = 1024


@dataclass(frozen=True)
class File:
    """`path` as its filesystem knows it, `name` short and unique among the files found with it, `size` in bytes.

    `broken` says why it cannot be what it is called, where that is known already; else it is empty.
    """

    name: str
    path: str
    size: int
    broken: str = ""

    @property
    def place(self) -> dict[str, str | int]:
        """What a part says of its file."""
        place: dict[str, str | int] = {"path": self.path, "file": self.name, "size": self.size}
        return place | {"broken": self.broken} if self.broken else place


class Files:
    """The files that a URL names, perhaps with wildcards and braces; `expected` files are named like `pattern`."""

    def __init__(self, source: str, url: str, expected: str, pattern: str):
        self.source, self.url, self.expected, self._pattern = source, url, expected, pattern
        self.fs, self._path = filesystem(source, "path", url)

    def find(self) -> list[File]:
        """All of them, by path.

        Raises:
            ConfigError: if there are none, or the filesystem does not let us see.
        """
        found = self._found()
        names = dict(zip(found, _short_names(list(found)), strict=True))
        return [File(names[path], path, size, self._broken(path, size)) for path, size in found.items()]

    def sizes(self) -> list[tuple[str, int]]:
        """Path and size of all of them, without opening any; raises as `find`."""
        return list(self._found().items())

    def open(self, part: SourcePartition) -> IO[bytes]:
        """The file that a part's place names as `path`."""
        return self.fs.open(part.place["path"], "rb")

    def _found(self) -> dict[str, int]:
        # A listing that fsspec remembers may be older than the files.
        self.fs.invalidate_cache()
        try:
            found = self._matching()
        except ConfigError:
            raise
        # Filesystems raise what their libraries do.
        except Exception as error:
            raise ConfigError(f"source {self.source}: path: cannot look at {self.url}: {error}") from error
        return dict(sorted(found.items()))

    def _matching(self) -> dict[str, int]:
        # A name with brackets or braces may be meant as it stands.
        paths = [self._path] if self._info(self._path) else expanded(self._path)
        found: dict[str, int] = {}
        for path in paths:
            info = self._info(path)
            infos = {path: info} if info else self.fs.glob(escaped(path, self.fs.exists), detail=True)
            files = {p: i for p, i in infos.items() if i["type"] != "directory"}
            if not files:
                raise ConfigError(f"source {self.source}: path: {self._nothing(path, bool(info))}")
            found |= {p: self.fs.size(p) if i["size"] is None else i["size"] for p, i in files.items()}
        return found

    def _info(self, path: str) -> dict | None:
        """None if nothing is there. For HTTP, `info` alone says so whatever the server answers."""
        try:
            return self.fs.info(path)
        except FileNotFoundError:
            if "://" in path:
                try:
                    self.fs.cat_file(path, 0, 1)
                except FileNotFoundError:
                    return None
            return None

    def _nothing(self, path: str, directory: bool) -> str:
        missing = self.url if path == self._path else path
        if directory:
            like = posixpath.join(self.url, self._pattern)
            return f"no file at {missing}, which is a directory; expected {self.expected} in it, as {like}"
        return f"no file at {missing}; expected {self.expected}"

    def _broken(self, path: str, size: int) -> str:
        if size == 0 or size >= _LFS_BYTES or not self.fs.cat_file(path).startswith(_LFS):
            return ""
        return "it is a pointer of Git LFS and not the file itself, which `git lfs pull` fetches"


def filesystem(source: str, field: str, url: str) -> tuple[AbstractFileSystem, str]:
    """The filesystem of a URL and the path in it.

    Raises:
        ConfigError: if fsspec does not know the protocol or lacks a package for it.
    """
    try:
        return url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"source {source}: {field}: cannot open {url}: {error}") from error


def _short_names(paths: list[str]) -> list[str]:
    names = [posixpath.basename(path) for path in paths]
    if len(set(names)) < len(names):
        shared = posixpath.commonprefix(paths).rfind("/") + 1
        names = [path[shared:] for path in paths]
    return names
