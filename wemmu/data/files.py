"""Where the files of a data set are: in a directory of this machine, or (`wemmu.data.remote`) in a cache of it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from wemmu.config.serving import fault_of, read_index
from wemmu.config.shards import DataSet, ShardError, Stream, written_anew


class DamageError(ShardError):
    """A record, or a whole shard file, is not what was written; `data.damaged: skip` does without it."""


class LostShardError(DamageError):
    """Nothing of a shard file can be read."""


class Files(Protocol):
    """What a stream needs of the place where its files are; `name` is a file's name inside the stream."""

    def dataset(self) -> DataSet:
        """Raises ShardError if there is no complete data set."""
        ...

    def index(self, stream: Stream) -> bytes:
        """The stream's index, which has the recorded sha256; raises ShardError."""
        ...

    def path(self, stream: Stream, name: str) -> Path:
        """Where the shard file is on this machine, if it is there."""
        ...

    def check(self, stream: Stream, name: str, size: int) -> None:
        """A cheap look before anything is read; raises LostShardError if the file cannot be the one of `size` bytes."""
        ...

    def held(self, stream: Stream, name: str, size: int) -> AbstractContextManager[None]:
        """While this is open, the shard file is at its path; raises LostShardError where it cannot be had."""
        ...

    def way_out(self, stream: Stream, name: str) -> str:
        """What a person can do about a shard file that is missing or damaged."""
        ...


class LocalFiles:
    """A data set in a directory of this machine."""

    def __init__(self, root: Path):
        self._root = root

    def dataset(self) -> DataSet:
        return DataSet.at(self._root)

    def index(self, stream: Stream) -> bytes:
        return read_index(self._root, stream)

    def path(self, stream: Stream, name: str) -> Path:
        return self._root / stream.settings.name / name

    def check(self, stream: Stream, name: str, size: int) -> None:
        path = self.path(stream, name)
        if fault := fault_of(path, size):
            raise LostShardError(f"the shard file {path} is {fault}; {self.way_out(stream, name)}")

    @contextmanager
    def held(self, stream: Stream, name: str, size: int) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            self.check(stream, name, size)
            raise

    def way_out(self, stream: Stream, name: str) -> str:
        return written_anew(self._root, stream.settings.name, name)
