"""Rows of images with captions, or with questions and answers."""

from typing import Any

from data_pipeline.records import RawRecord, Reason, RejectedError
from data_pipeline.sources.common import Root, conversation, image_of, one_of, prompt_of, text, without_marks
from data_pipeline.sources.files import File
from data_pipeline.sources.table import TableSource
from wemmu.config import Task, prepare


class FolderSource(TableSource[prepare.FolderSource]):
    """Text-to-image records, or records of the understanding task where the config names a field for the answer."""

    @property
    def _images(self) -> dict[str, str]:
        return {"image": self._config.image}

    @property
    def _texts(self) -> dict[str, str]:
        return _named({"caption": self._config.caption, "answer": self._config.answer})

    def _record(self, key: str, fields: dict[str, Any], root: Root | None) -> RawRecord:
        config = self._config
        prompt = None if config.caption is None else prompt_of(fields.get(config.caption), config.caption, key)
        image = one_of(fields.get(config.image), config.image)
        if not image:
            raise RejectedError(Reason.BAD_RECORD, f"{config.image} is missing")
        if config.answer is None:
            return RawRecord(key, Task.T2I, prompt, target=image_of(image, key, root))
        answer = _answer(fields.get(config.answer), config.answer)
        prompt = without_marks(prompt, 1, config.caption or "")
        return RawRecord(key, Task.UNDERSTANDING, prompt, images=(image_of(image, key, root),), answer=answer)


class ParquetSource(TableSource[prepare.ParquetSource]):
    """Text-to-image records of Parquet files."""

    expected, pattern = "Parquet files", "*.parquet"

    @property
    def _images(self) -> dict[str, str]:
        return {"image": self._config.image}

    @property
    def _texts(self) -> dict[str, str]:
        return _named({"caption": self._config.caption})

    def _is_parquet(self, file: File) -> bool:
        return True

    def _record(self, key: str, fields: dict[str, Any], root: Root | None) -> RawRecord:
        config = self._config
        prompt = None if config.caption is None else prompt_of(fields[config.caption], config.caption, key)
        image = image_of(one_of(fields[config.image], config.image), key, root if config.root else None)
        return RawRecord(key, Task.T2I, prompt, target=image)


def _named(fields: dict[str, str | None]) -> dict[str, str]:
    return {field: column for field, column in fields.items() if column is not None}


def _answer(value: object, field: str) -> str:
    said = conversation(value, field).model if isinstance(value, list) else text(value, field)
    if not said or not said.strip():
        raise RejectedError(Reason.BAD_RECORD, f"{field} is missing")
    return said
