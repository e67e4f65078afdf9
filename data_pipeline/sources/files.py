"""Finds the files of a source on any filesystem that fsspec opens."""

import posixpath
from dataclasses import dataclass
from typing import IO, Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from data_pipeline.records import SourcePartition
from wemmu.config import ConfigError
from wemmu.config.patterns import escaped, expanded

# Begin of a Git LFS pointer, which `git clone` leaves in place of a large file.
_LFS = b"version https://git-lfs.github.com/spec/"
# Larger files, in bytes, are not checked for being a pointer.
_LFS_BYTES = 1024

_ARCHIVES = ("zip://", "tar://", "libarchive://")


@dataclass(frozen=True)
class File:
    """`path` on its filesystem, `name` short and unique among its siblings, `size` in bytes.

    `broken` is the reason if the file is known to be broken, else empty.
    """

    name: str
    path: str
    size: int
    broken: str = ""

    @property
    def place(self) -> dict[str, str | int]:
        """Return the fields of a part's place that describe the file."""
        place: dict[str, str | int] = {"path": self.path, "file": self.name, "size": self.size}
        return place | {"broken": self.broken} if self.broken else place


class Files:
    """The files of a URL, which may hold wildcards and braces; `expected` files match `pattern`."""

    def __init__(self, source: str, url: str, expected: str, pattern: str):
        self.source, self.url, self.expected, self._pattern = source, url, expected, pattern
        self.fs, self._path = filesystem(source, "path", url)

    def find(self) -> list[File]:
        """Return all of them, sorted by path.

        Raises:
            ConfigError: if there are none, or the filesystem cannot list them.
        """
        found = self._found()
        names = dict(zip(found, _short_names(list(found)), strict=True))
        return [File(names[path], path, size, self._broken(path, size)) for path, size in found.items()]

    def sizes(self) -> list[tuple[str, int]]:
        """Return path and size of all of them, without opening any; raises as `find`."""
        return list(self._found().items())

    def open(self, part: SourcePartition) -> IO[bytes]:
        """Return the file of a part's place."""
        return self.fs.open(part.place["path"], "rb")

    def _found(self) -> dict[str, int]:
        # fsspec's cached listing may be outdated.
        self.fs.invalidate_cache()
        try:
            found = self._matching()
        except ConfigError:
            raise
        # Filesystems raise their libraries' exceptions.
        except Exception as error:
            raise ConfigError(f"source {self.source}: path: cannot list {self.url}: {error}") from error
        return dict(sorted(found.items()))

    def _matching(self) -> dict[str, int]:
        # A name may contain brackets or braces literally.
        paths = [self._path] if self._info(self._path) else expanded(self._path)
        found: dict[str, int] = {}
        for path in paths:
            info = self._info(path)
            infos = {path: info} if info else self.fs.glob(escaped(path, self.fs.exists), detail=True)
            # A link in a listing is "other", as are pipes and devices, which would never end.
            infos = {p: self.fs.info(p) if i["type"] == "other" else i for p, i in infos.items()}
            files = {p: i for p, i in infos.items() if i["type"] not in ("directory", "other")}
            if not files:
                raise ConfigError(f"source {self.source}: path: {self._nothing(path, info)}")
            found |= {p: self.fs.size(p) if i["size"] is None else i["size"] for p, i in files.items()}
        return found

    def _info(self, path: str) -> dict[str, Any] | None:
        """Return the entry at the path, or None. For HTTP, only `info` is reliable."""
        try:
            return self.fs.info(path)
        except FileNotFoundError:
            if "://" in path:
                try:
                    self.fs.cat_file(path, 0, 1)
                except FileNotFoundError:
                    return None
            return None

    def _nothing(self, path: str, info: dict[str, Any] | None) -> str:
        missing = self.url if path == self._path else path
        if info and info["type"] == "other":
            return f"{missing} is a pipe or a device, not a file; expected {self.expected}"
        if info:
            like = posixpath.join(self.url, self._pattern)
            return f"no file at {missing}, which is a directory; expected {self.expected} in it, as {like}"
        return f"no file at {missing}; expected {self.expected}"

    def _broken(self, path: str, size: int) -> str:
        if size == 0 or size >= _LFS_BYTES or not self.fs.cat_file(path).startswith(_LFS):
            return ""
        return "it is a Git LFS pointer, not the file; fetch it with `git lfs pull`"


def filesystem(source: str, field: str, url: str) -> tuple[AbstractFileSystem, str]:
    """Return the filesystem of a URL and the path in it.

    Raises:
        ConfigError: if fsspec does not know the protocol or lacks a package for it.
    """
    try:
        return url_to_fs(url)
    # Filesystems raise their libraries' exceptions.
    except Exception as error:
        inner = (
            "; a file in an archive is PROTOCOL://FILE::ARCHIVE"
            if url.startswith(_ARCHIVES) and "::" not in url
            else ""
        )
        raise ConfigError(f"source {source}: {field}: cannot open {url}: {error}{inner}") from error


def _short_names(paths: list[str]) -> list[str]:
    names = [posixpath.basename(path) for path in paths]
    if len(set(names)) < len(names):
        shared = posixpath.commonprefix(paths).rfind("/") + 1
        names = [path[shared:] for path in paths]
    return names
