"""Pictures in a folder, listed by JSONL files: {"image": "a/1.jpg", "caption": "..."}."""

from data_pipeline.records import RawRecord, Reason, RejectedError
from data_pipeline.sources.common import Root, text
from data_pipeline.sources.jsonl import JsonLinesSource, parse, path_field
from wemmu.config import Task, prepare


class FolderSource(JsonLinesSource[prepare.FolderSource]):
    """Text-to-image records, or records of the understanding task where the config names a field for the answer."""

    def _record(self, key: str, line: bytes, root: Root) -> RawRecord:
        fields, config = parse(line), self._config
        prompt = text(fields.get(config.caption), config.caption)
        answer = text(fields.get(config.answer), config.answer) if config.answer else ""
        if answer is None:
            raise RejectedError(Reason.BAD_RECORD, f"{config.answer} is missing")
        picture = root.picture(path_field(fields, config.image))
        if config.answer:
            return RawRecord(key, Task.UNDERSTANDING, prompt, images=(picture,), answer=answer)
        return RawRecord(key, Task.T2I, prompt, target=picture)
