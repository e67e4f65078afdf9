"""What the sources make of the values of their fields: images, texts, conversations; and never leaving a root."""

import os
import posixpath
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from xxhash import xxh64

from data_pipeline.records import EncodedImage, RawRecord, Reason, RejectedError, Rejection, SourcePartition
from data_pipeline.sources.files import filesystem
from wemmu.config import ConfigError

# How a text marks the places of its images; the chat format has them before the text.
_MARK = re.compile(r"\s*<image>\s*")
_HUMAN, _MODEL = ("human", "user"), ("gpt", "assistant")
# What a server answers for an image that it does not give, now and later.
_GONE = (401, 403, 404, 410)


class Root:
    """A directory below which image paths of a source must stay, or below one of `also`."""

    def __init__(self, fs: AbstractFileSystem, path: str, also: Iterable[str] = ()):
        self.fs, self.path = fs, path.rstrip("/")
        self._allowed = [self.path, *(other.rstrip("/") for other in also)]
        if isinstance(fs, LocalFileSystem):
            self._allowed = [os.path.realpath(other or "/") for other in [*self._allowed, *_blobs(self.path)]]

    def image(self, name: str) -> EncodedImage:
        """Raises RejectedError: UNSAFE_PATH if `name` or a symbolic link leads out, NO_IMAGE if no file is there."""
        if "\0" in name:
            raise RejectedError(Reason.UNSAFE_PATH, repr(name))
        path = self._resolved(name) if isinstance(self.fs, LocalFileSystem) else self._joined(name)
        try:
            return EncodedImage(name, self.fs.cat_file(path))
        except (FileNotFoundError, IsADirectoryError) as error:
            raise RejectedError(Reason.NO_IMAGE, name) from error
        except PermissionError as error:
            raise RejectedError(Reason.NO_IMAGE, f"{name}: {error}") from error
        except Exception as error:
            # The error of the library that speaks HTTP, which is loaded only where one reads from there.
            if getattr(error, "status", None) not in _GONE:
                raise
            raise RejectedError(Reason.NO_IMAGE, f"{name}: {error}") from error

    def _resolved(self, name: str) -> str:
        path = os.path.realpath(os.path.join(self.path or "/", name))
        if not any(os.path.commonpath([root, path]) == root for root in self._allowed):
            raise RejectedError(
                Reason.UNSAFE_PATH, f"{name} leads to {path}, outside of {self._allowed[0]}; also_below can allow it"
            )
        # Also false for a pipe, at which reading would wait for ever.
        if not os.path.isfile(path):
            raise RejectedError(Reason.NO_IMAGE, name)
        return path

    def _joined(self, name: str) -> str:
        path = self.fs._strip_protocol(name) if "://" in name else name
        for root in self._allowed:
            if path.startswith(f"{root}/"):
                return f"{root}/{inside(path[len(root) + 1 :])}"
        return f"{self.path}/{inside(name)}"


def _blobs(path: str) -> list[str]:
    """Where the links of a snapshot of the Hugging Face hub lead: REPO/snapshots/REVISION/... to REPO/blobs."""
    before, snapshots, _ = os.path.abspath(path or "/").partition("/snapshots/")
    return [f"{before}/blobs"] if snapshots and os.path.isdir(f"{before}/blobs") else []


def root_of(source: str, url: str, also: Iterable[str] = ()) -> Root:
    """Raises ConfigError: if there is no directory at the URL."""
    fs, path = filesystem(source, "root", url)
    if not fs.isdir(path):
        raise ConfigError(f"source {source}: root: no directory at {url}; expected the one that image paths start at")
    return Root(fs, path, [filesystem(source, "also_below", other)[1] for other in also])


def inside(name: str) -> str:
    """`name` in its shortest form, relative to a root that it does not leave; else RejectedError of UNSAFE_PATH."""
    shortest = posixpath.normpath(name)
    if "\0" in name or shortest in (".", "..") or shortest.startswith(("/", "../")):
        raise RejectedError(Reason.UNSAFE_PATH, repr(name))
    return shortest


def text(value: object, field: str) -> str | None:
    """A text that is or is not there; without the byte-order mark that programs on Windows begin one with.

    Raises:
        RejectedError: BAD_TEXT if it is not UTF-8, BAD_RECORD if it is not text at all.
    """
    try:
        if isinstance(value, bytes):
            value = value.decode("utf-8")
        elif isinstance(value, str):
            # JSON can write half of a surrogate pair, which no file can hold.
            value.encode("utf-8")
    except UnicodeError as error:
        raise RejectedError(Reason.BAD_TEXT, f"{field}: {error}") from error
    if value is not None and not isinstance(value, str):
        raise RejectedError(Reason.BAD_RECORD, f"{field} is not text but {type(value).__name__}")
    return value.removeprefix("\ufeff") if value is not None else None


def prompt_of(value: object, field: str, key: str) -> str | None:
    """A caption or instruction: a text, one of several, or what the human says in a conversation.

    Of several texts that say the same in other words the record's key decides which is taken, the same in every run.

    Raises:
        RejectedError: as `text` and `conversation`.
    """
    if not isinstance(value, list):
        return text(value, field)
    if _is_conversation(value):
        return conversation(value, field).human
    said = [choice for choice in (text(item, field) for item in value) if choice and choice.strip()]
    return said[xxh64(key).intdigest() % len(said)] if said else None


class Conversation(NamedTuple):
    human: str
    model: str


def conversation(value: object, field: str) -> Conversation:
    """One turn of each side, as LLaVA (`from`, `value`) or OpenAI (`role`, `content`) write it; a system's is ignored.

    Raises:
        RejectedError: BAD_RECORD if there are more turns or fewer, or it is none at all.
    """
    if not _is_conversation(value):
        raise RejectedError(Reason.BAD_RECORD, f"{field} is no conversation but {type(value).__name__}")
    assert isinstance(value, list)
    turns = [(turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in value]
    turns = [turn for turn in turns if turn[0] != "system"]
    if len(turns) != 2 or turns[0][0] not in _HUMAN or turns[1][0] not in _MODEL:
        roles = ", ".join(str(role) for role, _ in turns)
        raise RejectedError(
            Reason.BAD_RECORD, f"{field} has the turns {roles}; one of a human and one of a model make a record"
        )
    return Conversation(*(text(said, field) or "" for _, said in turns))


def _is_conversation(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def without_marks(prompt: str | None, images: int, field: str) -> str | None:
    """A prompt without the marks of its images.

    Raises:
        RejectedError: BAD_RECORD if it marks some, and not as many as the record has.
    """
    if prompt is None or not (marks := len(_MARK.findall(prompt))):
        return prompt
    if marks != images:
        raise RejectedError(Reason.BAD_RECORD, f"{field} marks {marks} images, the record has {images}")
    return _MARK.sub(" ", prompt).strip()


def listed(value: object) -> list[Any]:
    """The one or the several values of a field; none if it is not there."""
    return value if isinstance(value, list) else [] if value is None else [value]


def one_of(value: object, field: str) -> object:
    """The only element of a list of one, or what is no list; BAD_RECORD if there are several."""
    values = listed(value)
    if len(values) > 1:
        raise RejectedError(Reason.BAD_RECORD, f"{field} has {len(values)} images where one belongs")
    return values[0] if values else None


def image_of(value: object, name: str, root: Root | None) -> EncodedImage:
    """An image from what a column may hold: its bytes, a path below `root`, or both as Hugging Face stores them.

    Raises:
        RejectedError: NO_IMAGE, UNSAFE_PATH, or BAD_RECORD if it is something else.
    """
    if isinstance(value, dict) and "bytes" in value:
        value = value.get("path") if value["bytes"] is None else value["bytes"]
    if isinstance(value, bytes):
        return EncodedImage(name, value)
    if not value or (isinstance(value, str) and root is None):
        raise RejectedError(Reason.NO_IMAGE, f"a path but no root: {value}" if value else f"{name}: no bytes, no path")
    if isinstance(value, str):
        assert root is not None
        return root.image(text(value, name) or "")
    raise RejectedError(Reason.BAD_RECORD, f"neither bytes nor a path but {type(value).__name__}")


def record_or_rejection(part: SourcePartition, key: str, make: Callable[[], RawRecord]) -> RawRecord | Rejection:
    """What `make` returns, or the reason why it could not."""
    try:
        return make()
    except RejectedError as error:
        return part.rejection(key, error.reason, error.detail)
