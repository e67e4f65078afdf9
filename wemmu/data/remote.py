"""A remote data set, read through a cache of limited size that all processes of this machine share.

ROOT/dataset.json       the data set's record, fetched at every start
ROOT/shards/SHA256      a shard file, named by its content: another version of the data set never finds a stale one
ROOT/shards/SHA256.part one that is being fetched, of its final size from the start, so that it counts
ROOT/lock               held while files are added and deleted

Every lock is the kernel's own (flock) on these very files, so it ends when the process that holds it ends, however that
happens. A reader shares the lock of the shard it reads, and only what can be locked alone is deleted.

fsspec opens the other side; its caching file systems are not used, because none of them has a bound or may be shared by
processes. streaming's has a bound, but leaves locks and shared memory behind when it is killed, and checks no hash.
"""

import hashlib
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fsspec.core import url_to_fs
from tenacity import retry, retry_if_exception_type, stop_after_attempt

from wemmu.config.files import naming, replace_text
from wemmu.config.shards import (
    DATASET_FILE,
    INDEX_FILE,
    REWRITE,
    SETTINGS_FILE,
    DataSet,
    ShardError,
    Stream,
    written_anew,
)
from wemmu.data.files import Files, LostShardError
from wemmu.locks import EXCLUSIVE, SHARED, take

# Seconds between two looks for room, while other processes read all that could be deleted.
PAUSE = 0.02


class ShardCache(Files):
    """The data set at `url`; `root` caches at most `gigabytes` of it and evicts the least recently used shards.

    Raises:
        ShardError: if `url` cannot be opened or `root` is a data set that was written here.
    """

    def __init__(self, url: str, root: Path, gigabytes: float):
        if (root / SETTINGS_FILE).exists():
            raise ShardError(f"{root} contains a data set, so it cannot be the cache of {url}; set another data.shards")
        self._url, self._root, self._limit = url.rstrip("/"), root, round(gigabytes * 1e9)
        try:
            self._remote, self._base = url_to_fs(self._url)
        except Exception as error:
            raise self._unreachable(url, error) from error
        # While it is locked, no other process or thread changes which files are there, and how large they are.
        self._lock = root / "lock"
        self._shards = root / "shards"
        self._shards.mkdir(parents=True, exist_ok=True)

    def dataset(self) -> DataSet:
        try:
            text = self._remote.cat_file(f"{self._base}/{DATASET_FILE}").decode()
        except FileNotFoundError as error:
            raise ShardError(f"{self._url} holds no complete data set (it has no {DATASET_FILE})") from error
        except Exception as error:
            raise self._unreachable(f"{self._url}/{DATASET_FILE}", error) from error
        file = self._root / DATASET_FILE
        with _locked(self._lock):
            if not file.exists() or file.read_bytes() != text.encode():
                replace_text(file, text)
            dataset = DataSet.at(self._root)
        # They become names of files.
        if odd := [d for s in dataset.streams for d in s.files.values() if not re.fullmatch("[0-9a-f]{64}", d)]:
            raise ShardError(f"{self._url}/{DATASET_FILE} has {odd[0]!r} where a SHA-256 is needed")
        return dataset

    def check_limit(self, needed: int) -> None:
        """Refuse a limit that `needed` bytes of shards, which are read in turns, do not fit into."""
        needed += (self._root / DATASET_FILE).stat().st_size
        if needed > self._limit:
            raise ShardError(
                f"data.cache_gb is {self._limit / 1e9:g}, but the stage reads one shuffling window of each of its "
                f"streams at a time, together {math.ceil(needed / 1e6) / 1e3:g} GB: give data.cache_gb at least that"
            )

    def index(self, stream: Stream) -> bytes:
        return self._recorded(
            stream, INDEX_FILE, "index", f"to have it made anew, delete {self._url}/{DATASET_FILE} and {REWRITE}"
        )

    def path(self, stream: Stream, name: str) -> Path:
        return self._shards / stream.files[name]

    def check(self, stream: Stream, name: str, size: int) -> None:
        """Do nothing: shards are checked when they are downloaded."""

    @contextmanager
    def available(self, stream: Stream, name: str, size: int) -> Iterator[None]:
        path = self.path(stream, name)
        while (file := _shared(path)) is None:
            self._fetch(stream, name, size)
        try:
            os.utime(file)  # marks the last use
            yield
        finally:
            os.close(file)

    def remedy(self, stream: Stream, name: str) -> str:
        cached = f"to have it fetched anew, delete {self.path(stream, name)}"
        return f"{cached}; if the file at {self._url} is itself damaged, {self._anew(stream, name)}"

    def _anew(self, stream: Stream, name: str) -> str:
        return written_anew(self._url, stream.settings.name, name)

    def _fetch(self, stream: Stream, name: str, size: int) -> None:
        """Have the shard in the cache, unless another process or thread is faster."""
        path = self.path(stream, name)
        aside = path.with_suffix(".part")
        with _alone(aside) as part:
            if path.exists():
                return
            os.ftruncate(part, 0)
            self._make_room(part, size)
            content = self._download(stream, name)
            with naming(aside):
                with os.fdopen(part, "wb", closefd=False) as file:
                    file.write(content)
                os.fsync(part)
            with _locked(self._lock):
                os.replace(aside, path)

    def _download(self, stream: Stream, name: str) -> bytes:
        """The content of a shard, which is the recorded one; raises ShardError."""
        return self._recorded(stream, name, "file", self._anew(stream, name))

    # Damage and loss may be the connection's.
    @retry(retry=retry_if_exception_type(ShardError), stop=stop_after_attempt(2), reraise=True)
    def _recorded(self, stream: Stream, name: str, kind: str, remedy: str) -> bytes:
        """The content of a file of the stream, which has the recorded sha256."""
        path = f"{stream.settings.name}/{name}"
        try:
            # Not `open`, which for HTTP raises FileNotFoundError whatever is wrong with the connection.
            content = self._remote.cat_file(f"{self._base}/{path}")
        except FileNotFoundError as error:
            raise LostShardError(f"the shard {kind} {self._url}/{path} is missing; {remedy}") from error
        except Exception as error:
            raise self._unreachable(f"{self._url}/{path}", error) from error
        if hashlib.sha256(content).hexdigest() != stream.files[name]:
            raise LostShardError(f"the shard {kind} {self._url}/{path} is damaged (its sha256 differs); {remedy}")
        return content

    def _make_room(self, part: int, size: int) -> None:
        """Delete what was not used for longest until `part` can grow to `size`; waits while all of it is in use."""
        while True:
            with _locked(self._lock):
                used = sorted(_entries(self._shards))
                taken = (self._root / DATASET_FILE).stat().st_size + sum(held for _, held, _ in used)
                over = taken + size - self._limit
                for _, _, path in used:
                    if over <= 0:
                        break
                    over -= _delete_unused(path)
                if over <= 0:
                    os.ftruncate(part, size)
                    return
            time.sleep(PAUSE)

    def _unreachable(self, url: str, error: Exception) -> ShardError:
        return ShardError(
            f"{url} cannot be read ({type(error).__name__}: {error}); is the URL of data.remote right, and can this "
            "machine reach it?"
        )


def _entries(directory: Path) -> Iterator[tuple[float, int, str]]:
    """Last use (a time), size in bytes and path of every file."""
    for entry in os.scandir(directory):
        with suppress(FileNotFoundError):
            state = entry.stat()
            yield state.st_mtime, state.st_size, entry.path


def _delete_unused(path: str) -> int:
    """Delete a file unless somebody reads or writes it; how many bytes that frees."""
    # Open for writing: NFS gives an exclusive lock to nobody else.
    with suppress(FileNotFoundError), _opened(path, os.O_RDWR) as file:
        if not take(file, EXCLUSIVE, path):
            return 0
        size = os.fstat(file).st_size
        os.unlink(path)
        return size
    return 0


def _shared(path: Path) -> int | None:
    """Open a file under a lock with which nobody deletes it; None if it is not there (any more)."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    take(file, SHARED, path, wait=True)
    if _is_at(file, path):
        return file
    os.close(file)
    return None


@contextmanager
def _alone(path: Path) -> Iterator[int]:
    """Open a file, new or left by somebody killed, as the only one; it is deleted at the end if it is still there."""
    while True:
        with _locked(path) as file:
            # What we waited for may have been renamed or deleted meanwhile.
            if _is_at(file, path):
                try:
                    yield file
                finally:
                    if _is_at(file, path):
                        os.unlink(path)
                return


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    with _opened(path, os.O_RDWR | os.O_CREAT) as file:
        take(file, EXCLUSIVE, path, wait=True)
        yield file


@contextmanager
def _opened(path: Path | str, flags: int) -> Iterator[int]:
    file = os.open(path, flags, 0o666)
    try:
        yield file
    finally:
        os.close(file)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
