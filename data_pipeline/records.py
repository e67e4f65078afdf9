"""What travels along the chain: a raw record as its source has it, and the reasons why one can be left out."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from PIL import Image
from pydantic.dataclasses import dataclass as checked_dataclass

from wemmu.config.task import Task


class Reason(StrEnum):
    """Why a record is not in the data set."""

    # The record is damaged or hostile.
    BAD_CONTAINER = "container broken"  # the tar or Parquet file ends or breaks here; key "" if no record is known
    MERGED = "names merge into one record"  # of many members of a tar, which the first dot of their names makes one
    BAD_RECORD = "record unreadable"  # not JSON, or a field is missing or of another type
    BAD_TEXT = "text is not UTF-8"
    NO_IMAGE = "image missing"
    NO_CAPTION = "caption missing"
    UNSAFE_PATH = "path leaves its root"
    EMPTY_IMAGE = "image has no bytes"
    NOT_AN_IMAGE = "not an image"
    TRUNCATED = "image truncated"
    TOO_MANY_PIXELS = "image has too many pixels"
    # The record is whole, and not wanted.
    TOO_SMALL = "image too small"
    TOO_OBLONG = "image too oblong"
    CAPTION_TOO_SHORT = "caption too short"
    CAPTION_TOO_LONG = "caption too long"
    DUPLICATE = "duplicate"
    # The record is of a task that no stage uses; such are counted and not listed.
    UNUSED = "task not used"

    @classmethod
    def _missing_(cls, value: object) -> "Reason | None":
        """Ledgers that were written when images were called pictures."""
        new = str(value).replace("a picture", "an image").replace("picture", "image")
        return None if new == value else cls(new)

    @property
    def damaged(self) -> bool:
        return self not in _UNWANTED

    @property
    def lost(self) -> bool:
        """A container is lost, and with it records that nobody has counted."""
        return self is Reason.BAD_CONTAINER


_UNWANTED = {
    Reason.TOO_SMALL,
    Reason.TOO_OBLONG,
    Reason.CAPTION_TOO_SHORT,
    Reason.CAPTION_TOO_LONG,
    Reason.DUPLICATE,
    Reason.UNUSED,
}


# Characters of a rejection's detail.
LONGEST_DETAIL = 400


@checked_dataclass(frozen=True)
class Rejection:
    """A record that was left out: a line of rejected.jsonl. `part` is the unit of the source that it stood in."""

    source: str
    part: str
    key: str
    reason: Reason
    detail: str = ""


def short(text: str) -> str:
    """What a message or a line of a log shows of a text: a field may hold a whole file where a path belongs."""
    return text if len(text) <= LONGEST_DETAIL else f"{text[: LONGEST_DETAIL // 2]}... ({len(text)} characters)"


class RejectedError(Exception):
    """Raised by a stage to leave out the record at hand; of a long `detail` the beginning is kept."""

    def __init__(self, reason: Reason, detail: str = ""):
        detail = short(detail)
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class EncodedImage:
    """An image as a file's content, not decoded yet; `name` is for messages."""

    name: str
    data: bytes


class Drawing(Protocol):
    """An image without a size of its own: it is drawn anew for every bucket."""

    def draw(self, height: int, width: int) -> Image.Image: ...


RawImage = EncodedImage | Drawing


@dataclass(frozen=True)
class RawRecord:
    """A record as its source has it.

    `key` is unique in its source and the same in every run; "NAME/KEY" with the source's name becomes the record's id.
    `images` are the input images. `target` None means that the first of them is the target (or, for understanding,
    that no image is made). `prompt` None means that the source has no caption for it.
    """

    key: str
    task: Task
    prompt: str | None
    images: tuple[RawImage, ...] = ()
    target: RawImage | None = None
    answer: str = ""


@dataclass(frozen=True)
class SourcePartition:
    """A unit of a source that one worker reads from beginning to end, in always the same order.

    `name` is unique in its source and for people; `place` holds JSON values that tell the source where it is. Together
    they must change when the unit's content may have (a file's size, the number of rows).
    """

    source: str
    name: str
    place: dict[str, Any]

    def rejection(self, key: str, reason: Reason, detail: str = "") -> Rejection:
        """That one of its records is left out."""
        return Rejection(self.source, self.name, key, reason, detail)


class Source(Protocol):
    """What a kind of source must offer; `data_pipeline.sources` maps kinds of config to classes.

    `version` is raised whenever the records of an unchanged source change. A part that is known not to open before it
    is read has the reason as `broken` in its place.
    """

    version: int

    def files(self) -> list[tuple[str, int]]:
        """Name and size of every file there is now, without opening any; none where there is no cheap way to tell.

        Raises:
            ConfigError: as `parts`.
        """
        ...

    def parts(self, size: int) -> list[SourcePartition]:
        """The parts, always in the same order; `size` is the wanted number of records in each where it can be chosen.

        Raises:
            ConfigError: if there is nothing at the path, or not of the right kind.
        """
        ...

    def read(self, part: SourcePartition) -> Iterator[RawRecord | Rejection]:
        """The records of a part. What is broken becomes a Rejection and reading goes on where that is possible."""
        ...
