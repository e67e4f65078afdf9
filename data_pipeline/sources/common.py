"""Converts the fields of sources to images, texts and conversations, and keeps paths below their root."""

import base64
import os
import posixpath
import re
import zlib
from collections.abc import Callable, Iterable
from tarfile import TarError
from typing import Any, NamedTuple
from zipfile import BadZipFile

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from xxhash import xxh64

from data_pipeline.records import EncodedImage, RawRecord, Reason, RejectedError, Rejection, SourcePartition
from data_pipeline.sources.files import filesystem
from wemmu.config import ConfigError
from wemmu.config.shards import TURN

# Marks of images in a text; the chat format puts images before the text.
_MARK = re.compile(r"\s*<image>\s*")
# An image as text: a data URL, or the base64 of the first bytes of a JPEG, PNG, WebP or GIF; no path is like these.
_BASE64 = re.compile(r"data:image/[^,]*;base64,|(?=(/9j/|iVBORw0KGgo|UklGR|R0lGOD)[A-Za-z0-9+/]{40})")
_HUMAN, _MODEL = ("human", "user"), ("gpt", "assistant")
# HTTP status of an image that the server refuses permanently.
_GONE = (401, 403, 404, 410)


class Root:
    """A directory below which image paths of a source must stay, or below one of `also`."""

    def __init__(self, fs: AbstractFileSystem, path: str, also: Iterable[str] = ()):
        self.fs, self.path = fs, path.rstrip("/")
        self._allowed = [self.path, *(other.rstrip("/") for other in also)]
        if isinstance(fs, LocalFileSystem):
            self._allowed = [os.path.realpath(other or "/") for other in [*self._allowed, *_blobs(self.path)]]

    def image(self, name: str) -> EncodedImage:
        """Raise RejectedError: UNSAFE_PATH if `name` or a symbolic link leads out, NO_IMAGE if no file is there."""
        if "\0" in name:
            raise RejectedError(Reason.UNSAFE_PATH, repr(name))
        path = self._resolved(name) if isinstance(self.fs, LocalFileSystem) else self._joined(name)
        try:
            return EncodedImage(name, self.fs.cat_file(path))
        # KeyError: of zip and tar.
        except (FileNotFoundError, IsADirectoryError, KeyError) as error:
            raise RejectedError(Reason.NO_IMAGE, name) from error
        except (BadZipFile, TarError, EOFError, zlib.error) as error:
            raise RejectedError(Reason.TRUNCATED, f"{name}: {error}") from error
        except PermissionError as error:
            raise RejectedError(Reason.NO_IMAGE, f"{name}: {error}") from error
        except Exception as error:
            # aiohttp's error; the library is loaded only for reading over HTTP.
            if getattr(error, "status", None) not in _GONE:
                raise
            raise RejectedError(Reason.NO_IMAGE, f"{name}: {error}") from error

    def _resolved(self, name: str) -> str:
        path = os.path.realpath(os.path.join(self.path or "/", name))
        if not any(os.path.commonpath([root, path]) == root for root in self._allowed):
            raise RejectedError(
                Reason.UNSAFE_PATH, f"{name} leads to {path}, outside of {self._allowed[0]}; also_below can allow it"
            )
        # Also false for a pipe, from which reading would block.
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
    """Return the target folder of the links in a Hugging Face snapshot: REPO/snapshots/REVISION/... -> REPO/blobs."""
    before, snapshots, _ = os.path.abspath(path or "/").partition("/snapshots/")
    return [f"{before}/blobs"] if snapshots and os.path.isdir(f"{before}/blobs") else []


def root_of(source: str, url: str, also: Iterable[str] = ()) -> Root:
    """Raise ConfigError if there is no directory at the URL."""
    fs, path = filesystem(source, "root", url)
    try:
        there = fs.isdir(path)
    # Filesystems raise their libraries' exceptions.
    except Exception as error:
        raise ConfigError(f"source {source}: root: cannot list {url}: {error}") from error
    if not there:
        raise ConfigError(f"source {source}: root: no directory at {url}; expected the root of the image paths")
    return Root(fs, path, [filesystem(source, "also_below", other)[1] for other in also])


def inside(name: str) -> str:
    """Return `name` normalised and relative to its root; RejectedError with UNSAFE_PATH if it leaves the root."""
    shortest = posixpath.normpath(name)
    if "\0" in name or shortest in (".", "..") or shortest.startswith(("/", "../")):
        raise RejectedError(Reason.UNSAFE_PATH, repr(name))
    return shortest


def text(value: object, field: str) -> str | None:
    """Return a text or None, without the byte-order mark that Windows programs write.

    Raises:
        RejectedError: BAD_TEXT if it is not UTF-8, BAD_RECORD if it is not text at all.
    """
    try:
        if isinstance(value, bytes):
            value = value.decode("utf-8")
        elif isinstance(value, str):
            # JSON allows half of a surrogate pair, which no file can hold.
            value.encode("utf-8")
    except UnicodeError as error:
        raise RejectedError(Reason.BAD_TEXT, f"{field}: {error}") from error
    if value is not None and not isinstance(value, str):
        raise RejectedError(Reason.BAD_RECORD, f"{field} is {type(value).__name__}, not text")
    return value.removeprefix("\ufeff") if value is not None else None


def prompt_of(value: object, field: str, key: str) -> str | None:
    """Return a caption or instruction: a text, one of several, or the human's turn of a conversation.

    From several texts the record's key picks one, the same in every run.

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
    """Return one turn of each side, in LLaVA's (`from`, `value`) or OpenAI's (`role`, `content`) form, without system.

    Raises:
        RejectedError: BAD_RECORD if the number of turns is another, or the value is not a conversation.
    """
    turns = _turns(value, field)
    if len(turns) != 2 or turns[0][0] not in _HUMAN or turns[1][0] not in _MODEL:
        roles = ", ".join(str(role) for role, _ in turns)
        raise RejectedError(
            Reason.BAD_RECORD, f"{field} has the turns {roles}; a record needs one of a human and one of a model"
        )
    return Conversation(*(text(said, field) or "" for _, said in turns))


def turns(value: object, field: str) -> list[Conversation]:
    """Return the turns of a conversation, in the forms of `conversation`, of any number; a system turn is left out.

    Raises:
        RejectedError: BAD_RECORD if the turns do not alternate, beginning with the human and ending with the model.
    """
    found = _turns(value, field)
    sides = [_HUMAN, _MODEL] * (len(found) // 2)
    if not found or len(found) % 2 or any(role not in side for (role, _), side in zip(found, sides, strict=True)):
        roles = ", ".join(str(role) for role, _ in found) or "none"
        raise RejectedError(Reason.BAD_RECORD, f"{field} has the turns {roles}; they must alternate: human, model, ...")
    said = [(text(words, field) or "").replace(TURN, " ") for _, words in found]
    return [Conversation(*pair) for pair in zip(said[::2], said[1::2], strict=True)]


def _turns(value: object, field: str) -> list[tuple[Any, Any]]:
    """Return role and words of each turn, without system; RejectedError with BAD_RECORD if it is not a conversation."""
    if not _is_conversation(value):
        raise RejectedError(Reason.BAD_RECORD, f"{field} is {type(value).__name__}, not a conversation")
    assert isinstance(value, list)
    turns = [(turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in value]
    return [turn for turn in turns if turn[0] != "system"]


def _is_conversation(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def without_marks(prompt: str | None, images: int, field: str) -> str | None:
    """Return a prompt without the marks of its images.

    Raises:
        RejectedError: BAD_RECORD if it has marks and their number differs from the record's images.
    """
    if prompt is None or not (marks := len(_MARK.findall(prompt))):
        return prompt
    if marks != images:
        raise RejectedError(Reason.BAD_RECORD, f"{field} marks {marks} images, the record has {images}")
    return _MARK.sub(" ", prompt).strip()


def listed(value: object) -> list[Any]:
    """Return the values of a field as a list; empty if the field is missing."""
    return value if isinstance(value, list) else [] if value is None else [value]


def one_of(value: object, field: str) -> object:
    """Return the value, or the only element of a list; BAD_RECORD if there are several."""
    values = listed(value)
    if len(values) > 1:
        raise RejectedError(Reason.BAD_RECORD, f"{field} has {len(values)} images; expected one")
    return values[0] if values else None


def image_of(value: object, name: str, root: Root | None) -> EncodedImage:
    """Return an image from a column's value: bytes, base64, a path below `root`, or as Hugging Face stores them.

    Raises:
        RejectedError: NO_IMAGE, UNSAFE_PATH, or BAD_RECORD for any other value.
    """
    if isinstance(value, dict) and not value.keys().isdisjoint(("bytes", "path")):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str) and (encoded := _BASE64.match(value)):
        try:
            return EncodedImage(name, base64.b64decode(value[encoded.end() :], validate=True))
        except ValueError as error:
            raise RejectedError(Reason.BAD_RECORD, f"{name}: {value[:30]}... is not base64: {error}") from error
    if isinstance(value, bytes):
        return EncodedImage(name, value)
    if not value or (isinstance(value, str) and root is None):
        raise RejectedError(
            Reason.NO_IMAGE, f"{name}: " + (f"a path but no root: {value}" if value else "no bytes, no path")
        )
    if isinstance(value, str):
        assert root is not None
        return root.image(text(value, name) or "")
    kind = f"a struct of {', '.join(value)}" if isinstance(value, dict) else type(value).__name__
    raise RejectedError(Reason.BAD_RECORD, f"{name}: {kind}, neither bytes nor a path")


def record_or_rejection(part: SourcePartition, key: str, make: Callable[[], RawRecord]) -> RawRecord | Rejection:
    """Return the result of `make`, or the rejection."""
    try:
        return make()
    except RejectedError as error:
        return part.rejection(key, error.reason, error.detail)
