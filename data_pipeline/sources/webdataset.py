"""Tar files of img2dataset or WebDataset, plain or gzip'ed, read as a stream; nothing is extracted to a disk.

Names are split as WebDataset does: up to the first dot of the base name is the key, the rest is the kind of member.
Names without either (directories, hidden files) are no records.
"""

import gzip
import posixpath
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import IO

from data_pipeline.records import Part, PictureFile, RawRecord, Reason, RejectedError, Rejection
from data_pipeline.sources.common import Files, inside, record_or_rejection, text
from data_pipeline.sources.jsonl import parse
from wemmu.config import Task, prepare

PICTURES = ("jpg", "jpeg", "png", "webp")

# A sparse or gzip'ed member can claim any size in a few bytes; no picture file is as large as this.
_LARGEST = 2**30

_BREAKS = (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error)


class _Member(tarfile.TarInfo):
    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Member":
        """As the base's, but only zeros end a tar: TarFile takes a broken header, or none, for its end as well."""
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


@dataclass
class _Group:
    """The members of one key, by kind; `fault` is the first reason why they are no record."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    fault: RejectedError | None = None


class WebDatasetSource:
    """Text-to-image records; a part is a tar file."""

    version = 1

    def __init__(self, config: prepare.WebDatasetSource):
        self._config = config
        self._files = Files(config.name, config.path, "tar files")
        self._wanted = {*PICTURES, *(place.partition(":")[0] for place in config.caption)}

    def parts(self, size: int) -> list[Part]:
        """One for each tar, whatever `size`."""
        return [
            Part(self._config.name, file.name, {"path": file.path, "file": file.name, "size": file.size})
            for file in self._files.find()
        ]

    def read(self, part: Part) -> Iterator[RawRecord | Rejection]:
        seen, group = set(), None
        with self._files.open(part) as file:
            try:
                for group in self._groups(file):
                    key = f"{part.place['file']}/{group.key}"
                    yield record_or_rejection(part, key, partial(self._record, key, group, group.key in seen))
                    seen.add(group.key)
            except _BREAKS as error:
                after = f"after {group.key}" if group else "at its beginning"
                yield Rejection(part.source, part.name, "", Reason.BAD_CONTAINER, f"{after}: {error}")

    def _groups(self, file: IO[bytes]) -> Iterator[_Group]:
        """Members of one key in succession. The last group before a break may lack members and is not given."""
        group = None
        with _opened(file) as tar:
            for member in tar:
                # TarFile remembers all members, which a stream has no use for.
                tar.members = []
                key, kind = _split(member.name)
                fault = self._fault(member, kind)
                if member.isdir() or not (kind or fault):
                    continue
                if group is None or key != group.key:
                    if group:
                        yield group
                    group = _Group(key)
                if kind in group.members:
                    fault = RejectedError(Reason.BAD_RECORD, f"{member.name} is there twice")
                if fault:
                    group.fault = group.fault or fault
                elif kind in self._wanted:
                    group.members[kind] = tar.extractfile(member).read()
            _check_end(tar)
        if group:
            yield group

    def _fault(self, member: tarfile.TarInfo, kind: str) -> RejectedError | None:
        try:
            inside(member.name)
        except RejectedError as error:
            return error
        if not member.isreg():
            return RejectedError(Reason.UNSAFE_PATH, f"{member.name} is a link or a device")
        if kind in self._wanted and member.size > _LARGEST:
            return RejectedError(Reason.BAD_RECORD, f"{member.name} has {member.size} bytes")
        return None

    def _record(self, key: str, group: _Group, repeated: bool) -> RawRecord:
        if group.fault:
            raise group.fault
        if repeated:
            raise RejectedError(Reason.BAD_RECORD, "the key has been there before")
        kinds = [kind for kind in PICTURES if kind in group.members]
        if not kinds:
            raise RejectedError(Reason.NO_PICTURE, f"no member {', '.join(PICTURES)}")
        if len(kinds) > 1:
            raise RejectedError(Reason.BAD_RECORD, f"several pictures: {', '.join(kinds)}")
        picture = PictureFile(f"{group.key}.{kinds[0]}", group.members[kinds[0]])
        return RawRecord(key, Task.T2I, self._caption(group.members), target=picture)

    def _caption(self, members: dict[str, bytes]) -> str | None:
        for place in self._config.caption:
            kind, _, name = place.partition(":")
            if kind not in members:
                continue
            caption = text(parse(members[kind]).get(name) if name else members[kind], place)
            if caption is not None:
                # A text file ends with a newline that is not the caption's.
                return caption if name else caption.strip()
        return None


@contextmanager
def _opened(file: IO[bytes]) -> Iterator[tarfile.TarFile]:
    # By its first bytes, since names lie; gzip's own reader checks sums and lengths, tarfile's does not.
    compressed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    with (
        gzip.GzipFile(fileobj=file) if compressed else file as stream,
        # Names are UTF-8 whatever the locale is; those that are not get escapes, so that keys can be stored.
        tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member, encoding="utf-8", errors="backslashreplace") as tar,
    ):
        yield tar


def _check_end(tar: tarfile.TarFile) -> None:
    while block := tar.fileobj.read(2**20):
        if block.strip(b"\0"):
            raise tarfile.ReadError("there is more behind the end of the archive")


def _split(name: str) -> tuple[str, str]:
    """Key and kind; hidden files and those without a suffix have no kind."""
    folder, base = posixpath.split(posixpath.normpath(name))
    stem, _, kind = base.partition(".")
    return (posixpath.join(folder, stem), kind.lower()) if stem else (posixpath.join(folder, base), "")
