"""Conversations of any number of turns about no, one or several images, as LLaVA and Cambrian publish them."""

from collections.abc import Iterator
from typing import Any

from data_pipeline.records import RawRecord, Reason, RejectedError, SourcePartition
from data_pipeline.sources.common import Root, image_of, listed, turns, without_marks
from data_pipeline.sources.files import File
from data_pipeline.sources.rows import parts_of_rows
from data_pipeline.sources.table import TableSource
from wemmu.config import Task, prepare
from wemmu.config.shards import TURN


class ConversationsSource(TableSource[prepare.ConversationsSource]):
    """Reads understanding records; `wemmu.config.shards.TURN` separates the turns of prompt and answer."""

    version = 1
    texts = ("conversations",)

    def _parts(self, file: File, size: int) -> Iterator[SourcePartition]:
        if file.broken or self._is_parquet(file):
            yield from super()._parts(file, size)
        else:
            # The first rows may all be of words alone, so only the conversations must be there.
            yield from parts_of_rows(self._files, file, size, self._texts)

    def _record(self, key: str, fields: dict[str, Any], root: Root | None) -> RawRecord:
        config = self._config
        images = [image for image in listed(fields.get(config.image)) if image]
        asked, said = zip(*turns(fields.get(config.conversations), config.conversations), strict=True)
        # A turn's own marks do not say which images are meant: counted are those of the whole conversation.
        words = without_marks(TURN.join(asked), len(images), config.conversations) or ""
        words = TURN.join(turn.strip() for turn in words.split(TURN))
        if any("<image>" in answer for answer in said):
            raise RejectedError(Reason.BAD_RECORD, f"{config.conversations}: a turn of the model has an <image> mark")
        if other := next((mark for mark in ("<video>", "<audio>") if mark in words), ""):
            raise RejectedError(Reason.BAD_RECORD, f"{config.conversations} is about {other[1:-1]}, not images")
        if not all(answer.strip() for answer in said):
            raise RejectedError(Reason.BAD_RECORD, f"{config.conversations}: a turn of the model is empty")
        made = tuple(image_of(image, f"{key}:{config.image}", root) for image in images)
        return RawRecord(key, Task.UNDERSTANDING, words, images=made, answer=TURN.join(said))
