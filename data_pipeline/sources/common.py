"""What the sources share: finding files on any filesystem that fsspec opens, and never leaving a root."""

import os
import posixpath
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from data_pipeline.records import Part, PictureFile, RawRecord, Reason, RejectedError, Rejection
from wemmu.config import ConfigError


@dataclass(frozen=True)
class File:
    """`path` as its filesystem knows it, `name` short and unique among the files found with it, `size` in bytes."""

    name: str
    path: str
    size: int


class Files:
    """The files that a URL names, perhaps with wildcards; `source` and `expected` are for messages."""

    def __init__(self, source: str, url: str, expected: str):
        self.source, self.url, self.expected = source, url, expected
        self.fs, self._path = filesystem(source, "path", url)

    def find(self) -> list[File]:
        """All of them, by path.

        Raises:
            ConfigError: if there are none.
        """
        # A listing that fsspec remembers may be older than the files.
        self.fs.invalidate_cache()
        # A name with brackets may be meant as it stands.
        literal = self.fs.isfile(self._path)
        found = {self._path: self.fs.info(self._path)} if literal else self.fs.glob(self._path, detail=True)
        paths = sorted(path for path, info in found.items() if info["type"] != "directory")
        if not paths:
            raise ConfigError(f"source {self.source}: path: no file at {self.url}; expected {self.expected}")
        names = [posixpath.basename(path) for path in paths]
        if len(set(names)) < len(names):
            shared = posixpath.commonprefix(paths).rfind("/") + 1
            names = [path[shared:] for path in paths]
        return [File(name, path, self.fs.size(path)) for name, path in zip(names, paths, strict=True)]

    def open(self, part: Part) -> IO[bytes]:
        """The file that a part's place names as `path`."""
        return self.fs.open(part.place["path"], "rb")


class Root:
    """A directory below which picture paths of a source must stay."""

    def __init__(self, fs: AbstractFileSystem, path: str):
        self.fs, self.path = fs, path.rstrip("/")

    def picture(self, name: str) -> PictureFile:
        """Raises RejectedError: UNSAFE_PATH if `name` or a symbolic link leads out, NO_PICTURE if no file is there."""
        path = f"{self.path}/{inside(name)}"
        if isinstance(self.fs, LocalFileSystem):
            root, path = os.path.realpath(self.path), os.path.realpath(path)
            if os.path.commonpath([root, path]) != root:
                raise RejectedError(Reason.UNSAFE_PATH, f"{name} is a link to somewhere else")
            # Also false for a pipe, at which reading would wait for ever.
            if not os.path.isfile(path):
                raise RejectedError(Reason.NO_PICTURE, name)
        try:
            return PictureFile(name, self.fs.cat_file(path))
        except (FileNotFoundError, IsADirectoryError) as error:
            raise RejectedError(Reason.NO_PICTURE, name) from error


def filesystem(source: str, field: str, url: str) -> tuple[AbstractFileSystem, str]:
    """The filesystem of a URL and the path in it.

    Raises:
        ConfigError: if fsspec does not know the protocol or lacks a package for it.
    """
    try:
        return url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"source {source}: {field}: cannot open {url}: {error}") from error


def root_of(source: str, url: str) -> Root:
    """Raises ConfigError: if there is no directory at the URL."""
    fs, path = filesystem(source, "root", url)
    if not fs.isdir(path):
        raise ConfigError(f"source {source}: root: no directory at {url}; expected the one that picture paths start at")
    return Root(fs, path)


def inside(name: str) -> str:
    """`name` in its shortest form, relative to a root that it does not leave; else RejectedError of UNSAFE_PATH."""
    shortest = posixpath.normpath(name)
    if "\0" in name or shortest in (".", "..") or shortest.startswith(("/", "../")):
        raise RejectedError(Reason.UNSAFE_PATH, repr(name))
    return shortest


def text(value: object, field: str) -> str | None:
    """A text that is or is not there.

    Raises:
        RejectedError: BAD_TEXT if it is not UTF-8, BAD_RECORD if it is not text at all.
    """
    try:
        if isinstance(value, bytes):
            return value.decode("utf-8")
        if isinstance(value, str):
            # JSON can write half of a surrogate pair, which no file can hold.
            value.encode("utf-8")
    except UnicodeError as error:
        raise RejectedError(Reason.BAD_TEXT, f"{field}: {error}") from error
    if value is not None and not isinstance(value, str):
        raise RejectedError(Reason.BAD_RECORD, f"{field} is not text but {type(value).__name__}")
    return value


def picture_of(value: object, name: str, root: Root | None) -> PictureFile:
    """A picture from what a column may hold: its bytes, a path below `root`, or both as Hugging Face stores them.

    Raises:
        RejectedError: NO_PICTURE, UNSAFE_PATH, or BAD_RECORD if it is something else.
    """
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return PictureFile(name, value)
    if value is None or (isinstance(value, str) and root is None):
        raise RejectedError(Reason.NO_PICTURE, "no bytes" if value is None else f"a path but no root: {value}")
    if isinstance(value, str):
        return root.picture(value)
    raise RejectedError(Reason.BAD_RECORD, f"neither bytes nor a path but {type(value).__name__}")


def record_or_rejection(part: Part, key: str, make: Callable[[], RawRecord]) -> RawRecord | Rejection:
    """What `make` returns, or the reason why it could not."""
    try:
        return make()
    except RejectedError as error:
        return Rejection(part.source, part.name, key, error.reason, error.detail)
