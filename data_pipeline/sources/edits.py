"""Edit records in JSONL files: {"instruction": "...", "input": "a.jpg" or a list of paths, "target": "b.jpg"}."""

from data_pipeline.records import RawRecord, Reason, RejectedError
from data_pipeline.sources.common import Root, text
from data_pipeline.sources.jsonl import JsonLinesSource, parse, path_field
from wemmu.config import Task, prepare


class EditsSource(JsonLinesSource[prepare.EditsSource]):
    """One input picture is of the edit task, several are of the multi-edit task."""

    def _record(self, key: str, line: bytes, root: Root) -> RawRecord:
        fields, config = parse(line), self._config
        prompt = text(fields.get(config.instruction), config.instruction)
        inputs = fields.get(config.input)
        paths = inputs if isinstance(inputs, list) else [inputs]
        if not paths:
            raise RejectedError(Reason.BAD_RECORD, f"{config.input} is empty")
        names = [path_field({config.input: path}, config.input) for path in paths]
        target = root.picture(path_field(fields, config.target))
        task = Task.EDIT if len(names) == 1 else Task.MULTI_EDIT
        return RawRecord(key, task, prompt, images=tuple(root.picture(name) for name in names), target=target)
