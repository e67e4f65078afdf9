"""Raw records of the sources, and the reasons to reject a record."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from PIL import Image
from pydantic.dataclasses import dataclass as checked_dataclass

from wemmu.command_line import FAILED
from wemmu.config.task import Task


class Reason(StrEnum):
    """Why a record is not in the data set."""

    # The record is damaged or hostile.
    BAD_CONTAINER = "container broken"  # the tar or Parquet file ends or breaks here; key "" if the record is unknown
    MERGED = "names merge into one record"  # the first dot of their names gives many members of a tar one key
    BAD_RECORD = "record unreadable"  # not JSON, or a field is missing or of another type
    BAD_TEXT = "text is not UTF-8"
    NO_IMAGE = "image missing"
    NO_CAPTION = "caption missing"
    UNSAFE_PATH = "path leaves its root"
    EMPTY_IMAGE = "image has no bytes"
    NOT_AN_IMAGE = "not an image"
    TRUNCATED = "image truncated"
    TOO_MANY_PIXELS = "image has too many pixels"
    # The record is undamaged but unsuitable.
    TOO_SMALL = "image too small"
    TOO_OBLONG = "image too oblong"
    CAPTION_TOO_SHORT = "caption too short"
    CAPTION_TOO_LONG = "caption too long"
    DUPLICATE = "duplicate"
    # No stage uses the record's task; counted, not listed.
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
        """Whether a container is lost, with an unknown number of records."""
        return self is Reason.BAD_CONTAINER


_UNWANTED = {
    Reason.TOO_SMALL,
    Reason.TOO_OBLONG,
    Reason.CAPTION_TOO_SHORT,
    Reason.CAPTION_TOO_LONG,
    Reason.DUPLICATE,
    Reason.UNUSED,
}


# Libraries by which fsspec reaches servers, with errors of their own.
_CLIENTS = ("aiohttp", "botocore", "gcsfs", "httpx", "paramiko")
# Characters of a rejection's detail.
LONGEST_DETAIL = 400


@checked_dataclass(frozen=True)
class Rejection:
    """A rejected record: a line of rejected.jsonl. `part` is the unit of the source that contains it."""

    source: str
    part: str
    key: str
    reason: Reason
    detail: str = ""


def short(text: str) -> str:
    """Shorten a text for a message: a field may hold a whole file instead of a path."""
    return text if len(text) <= LONGEST_DETAIL else f"{text[: LONGEST_DETAIL // 2]}... ({len(text)} characters)"


class RejectedError(Exception):
    """A step of the chain raises this to reject the current record; a long `detail` is truncated."""

    def __init__(self, reason: Reason, detail: str = ""):
        detail = short(detail)
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason, self.detail = reason, detail


class WorkerError(RuntimeError):
    """A worker died or had too little memory; another attempt may succeed."""

    exit_code = FAILED


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Raise WorkerError for what a disk or server raises while it is read: an OSError of no file, a library's own."""
    try:
        yield
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        if library in _CLIENTS or (isinstance(error, OSError) and error.filename is None):
            why = str(error) or repr(error)
            raise WorkerError(
                f"{what} cannot be read: {why}; when its disk or server answers, repeat the command"
            ) from error
        raise


@dataclass(frozen=True)
class EncodedImage:
    """An encoded image; `name` is for messages."""

    name: str
    data: bytes


class Drawing(Protocol):
    """An image that is rendered for every bucket. size: (height, width) that selects the bucket; None: the square."""

    @property
    def size(self) -> tuple[int, int] | None: ...

    def draw(self, height: int, width: int) -> Image.Image: ...


RawImage = EncodedImage | Drawing


@dataclass(frozen=True)
class RawRecord:
    """A record as its source holds it.

    `key` is unique in its source and the same in every run; the record's id is "NAME/KEY". `images` are the inputs.
    `target` None: the first input is the target (for understanding and captions: there is none). `prompt` None: the
    source has no caption.
    """

    key: str
    task: Task
    prompt: str | None
    images: tuple[RawImage, ...] = ()
    target: RawImage | None = None
    answer: str = ""

    @property
    def words(self) -> str:
        """Return the prompt without white space around it; empty if there is none."""
        return (self.prompt or "").strip()


@dataclass(frozen=True)
class SourcePartition:
    """A unit of a source that one worker reads from beginning to end, in a fixed order.

    `name` is unique in its source and readable; `place` holds JSON values by which the source finds it. Together they
    must change when the content may have changed (a file's size, the number of rows).
    """

    source: str
    name: str
    place: dict[str, Any]

    def rejection(self, key: str, reason: Reason, detail: str = "") -> Rejection:
        """Return the rejection of one of its records."""
        return Rejection(self.source, self.name, key, reason, detail)


class Source(Protocol):
    """The interface of a kind of source; `data_pipeline.sources` maps kinds of config to classes.

    `version` rises whenever the records of an unchanged source change. If a part is known not to open, its `place` has
    the reason as `broken`.
    """

    version: int

    def files(self) -> list[tuple[str, int]]:
        """Return name and size of every file now, without opening any; nothing if that is expensive.

        Raises:
            ConfigError: as `parts`.
        """
        ...

    def parts(self, size: int) -> list[SourcePartition]:
        """Return the parts in a fixed order; `size` is the number of records in each, if the source can choose it.

        Raises:
            ConfigError: if there is nothing at the path, or something of another kind.
        """
        ...

    def read(self, part: SourcePartition) -> Iterator[RawRecord | Rejection]:
        """Yield the records of a part. A broken record becomes a Rejection, and reading continues if possible."""
        ...
