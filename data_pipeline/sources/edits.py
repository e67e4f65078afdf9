"""Edit records: {"instruction": "...", "input": "a.jpg" or several, "target": "b.jpg"}, and published layouts."""

import re
from typing import Any

from data_pipeline.records import RawRecord, Reason, RejectedError
from data_pipeline.sources.common import Root, conversation, image_of, listed, one_of, prompt_of, without_marks
from data_pipeline.sources.table import TableSource
from wemmu.config import Task, prepare

# The mark of an image in the model's turn of a conversation.
_IMAGE = re.compile(r"<\w*image\w*>")


class EditsSource(TableSource[prepare.EditsSource]):
    """Reads edit records: task edit for one input image, multi_edit for several."""

    images, texts = ("input", "target"), ("instruction",)

    def _record(self, key: str, fields: dict[str, Any], root: Root | None) -> RawRecord:
        config = self._config
        inputs, target = self._inputs_and_target(fields)
        asked = fields.get(config.instruction)
        prompt = without_marks(prompt_of(asked, config.instruction, key), len(inputs), config.instruction)
        if isinstance(asked, list) and asked and isinstance(asked[0], dict):
            answer = conversation(asked, config.instruction).model
            if answer and not _IMAGE.search(answer):
                raise RejectedError(Reason.BAD_RECORD, f"the answer to {config.instruction} is text, not an image")
        images = tuple(image_of(image, f"{key}:{config.input}", root) for image in inputs)
        task = Task.EDIT if len(images) == 1 else Task.MULTI_EDIT
        return RawRecord(key, task, prompt, images, target=image_of(target, f"{key}:{config.target}", root))

    def _inputs_and_target(self, fields: dict[str, Any]) -> tuple[list[Any], Any]:
        config = self._config
        inputs = listed(fields.get(config.input))
        if config.input == config.target:
            inputs, target = inputs[:-1], (inputs or [None])[-1]
        else:
            target = one_of(fields.get(config.target), config.target)
        for field, images in ((config.input, inputs), (config.target, [target])):
            if not images or not all(images):
                raise RejectedError(Reason.BAD_RECORD, f"{field} is missing")
        return inputs, target
