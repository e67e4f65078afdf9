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
from itertools import islice
from typing import IO

from data_pipeline.records import EncodedImage, RawRecord, Reason, RejectedError, Rejection, SourcePartition, short
from data_pipeline.sources.common import inside, prompt_of, record_or_rejection, text
from data_pipeline.sources.files import Files
from data_pipeline.sources.rows import parse
from wemmu.config import ConfigError, Task, prepare

IMAGES = ("jpg", "jpeg", "png", "webp")

# A sparse or gzip'ed member can claim any size in a few bytes; no image file is as large as this.
_LARGEST = 2**30

# Bytes of records in hand that wait for a caption, or an image, which may stand further on.
_WAITING = 2**28
# Records at the beginning of a source, one of which has to have a caption where the config says.
_LOOKED_AT = 100

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
    # Kinds of the members that hold an image under a name with a further dot.
    dotted: list[str] = field(default_factory=list)
    # Kinds of members that are not read.
    others: dict[str, None] = field(default_factory=dict)

    @property
    def merged(self) -> bool:
        """Whether the names of several records have become the kinds of this one."""
        return len(self.dotted) > 1 and not self.fault and self.members.keys().isdisjoint(IMAGES)

    @property
    def bytes(self) -> int:
        return sum(map(len, self.members.values()))


class _UnsortedError(Exception):
    """The members of a record are too far apart to be brought together."""


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
        """One for each tar, whatever `size`."""
        parts = [SourcePartition(self._config.name, file.name, file.place) for file in self._files.find()]
        self._check_captions(parts)
        return parts

    def _check_captions(self, parts: list[SourcePartition]) -> None:
        """Raises ConfigError: if the first tar that can be read has no caption where the config says."""
        if not self._config.caption:
            return
        for part in parts:
            kinds: dict[str, None] = {}
            looked = 0
            for group in islice(self._all_groups(part), _LOOKED_AT):
                if isinstance(group, Rejection):
                    # A broken tar says nothing of how captions are named; reading it says what is wrong.
                    looked = 0
                    break
                if group.merged:
                    continue
                try:
                    if self._caption(group.key, group.members) is not None:
                        return
                except RejectedError:
                    # Something is there, if nothing good.
                    return
                looked += 1
                kinds |= dict.fromkeys([*group.members, *group.others])
            if looked:
                raise ConfigError(
                    f"source {self._config.name}: caption: none of the first {looked} records of {part.place['path']} "
                    f"has {' or '.join(self._config.caption)}; their members are {short(', '.join(kinds))}. Set "
                    "caption to where it stands, or caption: [] if there are none"
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
        """The record of a group; or, of one into which many records' names merge, each of them as damaged."""
        key = f"{part.place['file']}/{group.key}"
        if not group.merged:
            yield record_or_rejection(part, key, partial(self._record, key, group, repeated))
            return
        detail = f"the first dot of a name ends the key, {group.key}; rename the members so that keys have none"
        for kind in group.dotted:
            yield part.rejection(f"{key}.{kind}", Reason.MERGED, detail)

    def _all_groups(self, part: SourcePartition) -> Iterator[_Group | Rejection]:
        """The groups of a tar, and where it breaks that it does."""
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
        """Groups with what stands of them further on, as in a tar of all images and then all captions.

        What lacks its image or caption waits for it; of a tar that is sorted, and has captions, nothing does.

        Raises:
            _UnsortedError: if the rest of a group comes after more than fits into memory.
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
            raise RejectedError(Reason.BAD_RECORD, "the key has been there before")
        kinds = [kind for kind in IMAGES if kind in group.members]
        if not kinds:
            raise RejectedError(Reason.NO_IMAGE, f"no member {', '.join(IMAGES)}")
        if len(kinds) > 1:
            raise RejectedError(Reason.BAD_RECORD, f"several pictures: {', '.join(kinds)}")
        image = EncodedImage(f"{group.key}.{kinds[0]}", group.members[kinds[0]])
        return RawRecord(key, Task.T2I, self._caption(key, group.members), target=image)

    def _caption(self, key: str, members: dict[str, bytes]) -> str | None:
        found = None
        for place in self._config.caption:
            kind, _, name = place.partition(":")
            if kind not in members:
                continue
            caption = prompt_of(parse(members[kind]).get(name), place, key) if name else text(members[kind], place)
            # A text file ends with a newline that is not the caption's.
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
