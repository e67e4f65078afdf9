"""Rows of images with captions, or with questions and answers."""

from typing import Any

from data_pipeline.records import RawRecord, Reason, RejectedError
from data_pipeline.sources.common import Root, conversation, image_of, one_of, prompt_of, text, without_marks
from data_pipeline.sources.files import File
from data_pipeline.sources.table import TableSource
from wemmu.config import Task, prepare


class FolderSource(TableSource[prepare.FolderSource]):
    """Reads text-to-image records, or understanding records if the config names a field for the answer."""

    texts = ("caption", "answer")

    def _record(self, key: str, fields: dict[str, Any], root: Root | None) -> RawRecord:
        config = self._config
        if not one_of(fields.get(config.image), config.image):
            raise RejectedError(Reason.BAD_RECORD, f"{config.image} is missing")
        record = captioned(config, key, fields, root)
        if config.answer is None:
            return record
        prompt = without_marks(record.prompt, 1, config.caption or "")
        answer = _answer(fields.get(config.answer), config.answer)
        assert record.target is not None, "`captioned` puts the image there"
        return RawRecord(key, Task.UNDERSTANDING, prompt, images=(record.target,), answer=answer)


class ParquetSource(TableSource[prepare.ParquetSource]):
    """Text-to-image records of Parquet files."""

    expected, pattern = "Parquet files", "*.parquet"

    def _is_parquet(self, file: File) -> bool:
        return True

    def _record(self, key: str, fields: dict[str, Any], root: Root | None) -> RawRecord:
        return captioned(self._config, key, fields, root if self._config.root else None)


def captioned(config: prepare.CaptionedSource, key: str, fields: dict[str, Any], root: Root | None) -> RawRecord:
    """Return the text-to-image record of a row; raise RejectedError if there is none."""
    prompt = None if config.caption is None else prompt_of(fields.get(config.caption), config.caption, key)
    image = one_of(fields.get(config.image), config.image)
    return RawRecord(key, Task.T2I, prompt, target=image_of(image, f"{key}:{config.image}", root))


def _answer(value: object, field: str) -> str:
    said = conversation(value, field).model if isinstance(value, list) else text(value, field)
    if not said or not said.strip():
        raise RejectedError(Reason.BAD_RECORD, f"{field} is missing")
    return said
