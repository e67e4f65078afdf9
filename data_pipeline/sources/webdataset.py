"""Tar files of img2dataset or WebDataset, plain or gzip'ed, read as a stream; nothing is extracted to a disk.

Names are split as in WebDataset: the key is the base name up to the first dot, the rest is the kind of member. Names
without a key or a kind (directories, hidden files) are skipped.
"""

import gzip
import posixpath
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import IO

from data_pipeline.records import EncodedImage, RawRecord, Reason, RejectedError, Rejection, SourcePartition, short
from data_pipeline.sources.common import inside, prompt_of, record_or_rejection, text
from data_pipeline.sources.files import Files
from data_pipeline.sources.rows import parse
from wemmu.config import ConfigError, Task, prepare

# The suffixes of `wemmu.images.FORMATS`.
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")

# Upper bound of a member: a sparse or gzip'ed one can claim any size in a few bytes.
_LARGEST = 2**30

# Bytes of incomplete records that may wait for their other members.
_WAITING = 2**28
# One of this many first records must have the caption that the config names.
_LOOKED_AT = 100

_BREAKS = (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error)


class _Member(tarfile.TarInfo):
    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Member":
        """Read a member as the base class does, but accept only zeros as the end of a tar."""
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # typeshed lacks it
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


@dataclass
class _Group:
    """The members of one key, by kind; `fault` is the first reason for a rejection."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    fault: RejectedError | None = None
    # Kinds of image members whose name has another dot.
    dotted: list[str] = field(default_factory=list)
    # Kinds of unused members.
    others: dict[str, None] = field(default_factory=dict)

    @property
    def merged(self) -> bool:
        """Whether this group merges the members of several records."""
        return len(self.dotted) > 1 and not self.fault and self.members.keys().isdisjoint(IMAGES)

    @property
    def bytes(self) -> int:
        return sum(map(len, self.members.values()))


class _UnsortedError(Exception):
    """The members of a record are too far apart."""


class WebDatasetSource:
    """Text-to-image records; a part is a tar file."""

    version = 2

    def __init__(self, config: prepare.WebDatasetSource):
        self._config = config
        self._files = Files(config.name, config.path, "tar files", "*.tar")
        self._captions = {place.partition(":")[0] for place in config.caption}
        self._wanted = {*IMAGES, *(place.partition(":")[0] for place in config.caption)}

    def files(self) -> list[tuple[str, int]]:
        return self._files.sizes()

    def parts(self, size: int) -> list[SourcePartition]:
        """Return one part per tar, whatever `size`."""
        parts = [SourcePartition(self._config.name, file.name, file.place) for file in self._files.find()]
        self._check_captions(parts)
        return parts

    def _check_captions(self, parts: list[SourcePartition]) -> None:
        """Raise ConfigError if the first readable tar lacks the caption that the config names."""
        if not self._config.caption:
            return
        for part in parts:
            kinds: dict[str, None] = {}
            looked = 0
            for group in islice(self._all_groups(part), _LOOKED_AT):
                if isinstance(group, Rejection):
                    # A broken tar does not show the names of captions; reading it later reports the damage.
                    looked = 0
                    break
                if group.merged:
                    continue
                try:
                    if self._caption(group.key, group.members) is not None:
                        return
                except RejectedError:
                    # There is a caption, if only a bad one.
                    return
                looked += 1
                kinds |= dict.fromkeys([*group.members, *group.others])
            if looked:
                raise ConfigError(
                    f"source {self._config.name}: caption: none of the first {looked} records of {part.place['path']} "
                    f"has {' or '.join(self._config.caption)}; their members are {short(', '.join(kinds))}. Set "
                    "caption to the right one, or caption: [] if there are none"
                )

    def read(self, part: SourcePartition) -> Iterator[RawRecord | Rejection]:
        seen: set[str] = set()
        for group in self._all_groups(part):
            if isinstance(group, Rejection):
                yield group
                continue
            yield from self._of(part, group, group.key in seen)
            seen.add(group.key)

    def _of(self, part: SourcePartition, group: _Group, repeated: bool) -> Iterator[RawRecord | Rejection]:
        """Yield the record of a group, or a rejection for each record of a merged group."""
        key = f"{part.place['file']}/{group.key}"
        if not group.merged:
            yield record_or_rejection(part, key, partial(self._record, key, group, repeated))
            return
        detail = f"the first dot of a name ends the key, {group.key}; rename the members so that keys have no dot"
        for kind in group.dotted:
            yield part.rejection(f"{key}.{kind}", Reason.MERGED, detail)

    def _all_groups(self, part: SourcePartition) -> Iterator[_Group | Rejection]:
        """Yield the groups of a tar, and a rejection where it breaks."""
        if "broken" in part.place:
            yield part.rejection("", Reason.BAD_CONTAINER, part.place["broken"])
            return
        group = None
        with self._files.open(part) as file:
            try:
                for group in self._together(self._groups(file)):
                    yield group
            except _UnsortedError as error:
                yield part.rejection("", Reason.BAD_CONTAINER, str(error))
            except _BREAKS as error:
                after = f"after {group.key}" if group else "at its beginning"
                yield part.rejection("", Reason.BAD_CONTAINER, f"{after}: {error}")

    def _together(self, groups: Iterator[_Group]) -> Iterator[_Group]:
        """Yield complete groups, also from a tar with all images before all captions.

        A group without image or caption waits for it; in a sorted tar with captions none waits.

        Raises:
            _UnsortedError: if the waiting groups exceed the memory limit.
        """
        waiting: dict[str, _Group] = {}
        given_up: set[str] = set()
        held = 0
        try:
            for group in groups:
                if group.key in given_up:
                    raise _UnsortedError(
                        f"the members of {group.key} are far apart; sort the tar (tar --sort=name) for one record's to "
                        "stand together"
                    )
                if group.key in waiting:
                    earlier = waiting.pop(group.key)
                    held -= earlier.bytes
                    group = _joined(earlier, group)
                if group.fault or self._complete(group):
                    yield group
                    continue
                waiting[group.key] = group
                held += group.bytes
                while held > _WAITING:
                    oldest = waiting.pop(next(iter(waiting)))
                    held -= oldest.bytes
                    given_up.add(oldest.key)
                    yield oldest
        except _BREAKS:
            yield from waiting.values()
            raise
        yield from waiting.values()

    def _complete(self, group: _Group) -> bool:
        if not self._captions:
            return True
        return any(kind in group.members for kind in IMAGES) and not self._captions.isdisjoint(group.members)

    def _groups(self, file: IO[bytes]) -> Iterator[_Group]:
        """Yield the adjacent members of one key. Drops the last group before a break, which may lack members."""
        group = None
        with _opened(file) as tar:
            for member in tar:
                # TarFile keeps all members, which a stream does not need.
                tar.members = []  # type: ignore[attr-defined]  # typeshed lacks it
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
                    content = tar.extractfile(member)
                    assert content is not None, "a member that is not a file is a fault"
                    group.members[kind] = content.read()
                else:
                    group.others[kind] = None
                    if "." in kind and kind.rpartition(".")[2] in IMAGES:
                        group.dotted.append(kind)
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
            raise RejectedError(Reason.BAD_RECORD, "the key occurs twice")
        kinds = [kind for kind in IMAGES if kind in group.members]
        if not kinds:
            raise RejectedError(Reason.NO_IMAGE, f"no member {', '.join(IMAGES)}")
        if len(kinds) > 1:
            raise RejectedError(Reason.BAD_RECORD, f"several images: {', '.join(kinds)}")
        image = EncodedImage(f"{group.key}.{kinds[0]}", group.members[kinds[0]])
        return RawRecord(key, Task.T2I, self._caption(key, group.members), target=image)

    def _caption(self, key: str, members: dict[str, bytes]) -> str | None:
        found = None
        for place in self._config.caption:
            kind, _, name = place.partition(":")
            if kind not in members:
                continue
            caption = prompt_of(parse(members[kind]).get(name), place, key) if name else text(members[kind], place)
            # The final newline of a text file is not part of the caption.
            caption = caption if name or caption is None else caption.strip()
            if caption:
                return caption
            found = caption if found is None else found
        return found


def _joined(earlier: _Group, later: _Group) -> _Group:
    twice = earlier.members.keys() & later.members.keys()
    fault = RejectedError(Reason.BAD_RECORD, f"{earlier.key}.{min(twice)} is there twice") if twice else None
    return _Group(
        earlier.key,
        earlier.members | later.members,
        earlier.fault or later.fault or fault,
        earlier.dotted + later.dotted,
        earlier.others | later.others,
    )


@contextmanager
def _opened(file: IO[bytes]) -> Iterator[tarfile.TarFile]:
    # By its first bytes, because names can be wrong; gzip's reader checks sums and lengths, tarfile's does not.
    compressed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    with (
        gzip.GzipFile(fileobj=file) if compressed else file as stream,
        # Names are UTF-8 in any locale; invalid bytes become escapes, so that keys can be stored.
        tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member, encoding="utf-8", errors="backslashreplace") as tar,
    ):
        yield tar


def _check_end(tar: tarfile.TarFile) -> None:
    while block := tar.fileobj.read(2**20):
        if block.strip(b"\0"):
            raise tarfile.ReadError("there is data after the end of the archive")


def _split(name: str) -> tuple[str, str]:
    """Return key and kind; hidden files and names without a suffix have no kind."""
    folder, base = posixpath.split(posixpath.normpath(name))
    stem, _, kind = base.partition(".")
    return (posixpath.join(folder, stem), kind.lower()) if stem else (posixpath.join(folder, base), "")
