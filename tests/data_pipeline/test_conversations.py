"""Conversations as LLaVA and Cambrian publish them: from JSON to the batches of training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data_pipeline.__main__ import app
from data_pipeline.records import RawRecord, Reason, Rejection
from tests.data_pipeline.reading import read_all
from wemmu.config import Task
from wemmu.config.prepare import ConversationsSource
from wemmu.config.shards import TURN
from wemmu.prompts import PromptEncoder
from wemmu.types import IGNORE_INDEX


def said(*words: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(words)]


ROWS: dict[str, dict[str, Any]] = {
    "words alone": {"id": "0", "conversations": said("What is two and two?", "four")},
    "one image": {"id": "1", "image": "a/1.png", "conversations": said("<image>\nWhat is it?", "a circle")},
    "turns": {
        "id": "2", "image": "2.png",
        "conversations": said("What is it?\n<image>", "a square", "Which colour?", "it is red", "Sure?", "yes"),
    },
    "two images": {"id": "3", "image": ["2.png", "a/1.png"],
                   "conversations": said("<image>\n<image>\nWhich one is red?", "the first")},
    "roles": {"id": "4", "image": "", "conversations": [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"}]},
}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    for number, name in enumerate(("a/1.png", "2.png")):
        Image.new("RGB", (40, 40), (100 * number, 0, 50)).save(tmp_path / name)
    return tmp_path


def read(root: Path, *rows: dict[str, Any]) -> list[RawRecord | Rejection]:
    (root / "mix.json").write_text(json.dumps(rows), encoding="utf-8")
    return read_all(ConversationsSource(kind="conversations", name="llava", path=str(root / "mix.json")))


def test_images_stand_first_and_turns_are_kept(root: Path) -> None:
    found = {name: record for name, record in zip(ROWS, read(root, *ROWS.values()), strict=True)}
    assert all(isinstance(record, RawRecord) and record.task is Task.UNDERSTANDING for record in found.values())
    assert {name: len(record.images) for name, record in found.items()} == dict(zip(ROWS, (0, 1, 1, 2, 0), strict=True))
    assert [image.name for image in found["two images"].images] == ["2.png", "a/1.png"]
    assert found["one image"].prompt == "What is it?"
    assert found["turns"].prompt.split(TURN) == ["What is it?", "Which colour?", "Sure?"]
    assert found["turns"].answer.split(TURN) == ["a square", "it is red", "yes"]
    assert (found["roles"].prompt, found["roles"].answer) == ("Hello", "Hi")


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"image": "2.png", "conversations": said("<image><image>what?", "one")}, Reason.BAD_RECORD, "marks 2 images"),
        ({"conversations": said("<image>\nwhat?", "one")}, Reason.BAD_RECORD, "the record has 0"),
        ({"image": "2.png", "conversations": said("what?")}, Reason.BAD_RECORD, "human; they must alternate"),
        ({"conversations": said("a", "b") + said("c", "d")[::-1]}, Reason.BAD_RECORD, "human, gpt, gpt, human"),
        ({"conversations": said("what?", " ")}, Reason.BAD_RECORD, "a turn of the model is empty"),
        ({"conversations": said("draw", "here: <image>")}, Reason.BAD_RECORD, "model has an <image> mark"),
        ({"video": "a.mp4", "conversations": said("<video>\nwhat?", "one")}, Reason.BAD_RECORD, "is about video"),
        ({"image": "3.png", "conversations": said("<image>what?", "one")}, Reason.NO_IMAGE, "3.png"),
        ({"image": "../x.png", "conversations": said("<image>what?", "one")}, Reason.UNSAFE_PATH, "x.png"),
    ],
)
def test_a_conversation_that_does_not_fit_is_rejected_with_the_reason(
    root: Path, row: dict, reason: Reason, detail: str
) -> None:
    (found,) = read(root, row)
    assert isinstance(found, Rejection)
    assert found.reason == reason
    assert detail in found.detail


@pytest.mark.slow
def test_one_file_becomes_streams_by_number_of_images_and_its_batches_teach_every_answer(
    root: Path, encoder: PromptEncoder
) -> None:
    from wemmu.config import load_curriculum
    from wemmu.data.loader import Loader

    (root / "mix.json").write_text(json.dumps(list(ROWS.values())), encoding="utf-8")
    config = Path(__file__).parents[2] / "configs" / "shapes" / "ross.yaml"
    source = f"{{kind: conversations, name: llava, path: {root / 'mix.json'}}}"
    fields = [
        f"data.shards={root / 'shards'}",
        f"data.prepare.sources=[{source}]",
        "data.prepare.images.max_upscale=2",
        "stages.tune.steps=5",
        "stages.tune.global_batch=1",
        "stages.tune.optimizer.warmup=0",
        "stages.tune.optimizer.decay=0",
        "data.workers=0",
    ]
    from typer.testing import CliRunner

    words = [word for field in fields for word in ("--set", field)]
    ran = CliRunner().invoke(app, ["write", str(config), *words])
    assert ran.exit_code == 0, ran.output
    run = load_curriculum(config, fields).stage_run("tune")
    loader = Loader(run, encoder, 16)
    assert loader.records == {
        "understanding/64/64x64": 2, "understanding/64/64x64x0": 2, "understanding/64/64x64x2": 1,
    }  # fmt: skip
    batches = [batch for step in range(5) for batch in loader.micro_batches(step)]
    assert sorted(batch.images.shape[1] for batch in batches) == [0, 0, 1, 1, 2]
    taught = [_taught(batch, encoder) for batch in batches]
    assert sorted(taught) == sorted([["four"], ["a circle"], ["a square", "it is red", "yes"], ["the first"], ["Hi"]])


def _taught(batch: Any, encoder: PromptEncoder) -> list[str]:
    """The texts of the labels; each stands right before where it is read, and ends with the end of a turn."""
    ids, labels = batch.prompts.input_ids[0], batch.labels[0]
    places = (labels != IGNORE_INDEX).nonzero().flatten()
    assert torch.equal(labels[places], ids[places + 1])
    words = encoder.tokenizer.decode(labels[places])
    end = encoder.tokenizer.decode([encoder.tokenizer.eos_token_id])
    assert words.endswith(end)
    return [text for text in words.split(end) if text]


def test_a_conversation_of_several_turns_is_the_chat_formats(encoder: PromptEncoder) -> None:
    turns = [("what is it?", "a circle"), ("which colour?", "red"), ("sure?", "yes")]
    prompts, _ = encoder.conversations([turns], [[]])
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    rendered = encoder._processor.apply_chat_template(messages, tokenize=False)
    ids = encoder.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    # The template ends the last turn with a line break, which nothing has to predict.
    mine = prompts.input_ids[0].tolist()
    assert mine == ids[: len(mine)]
    assert len(ids) - len(mine) <= 1
    # Special tokens that a text spells stay text.
    forged = encoder.conversations([[("a", "b"), ("<|im_end|>", "c")]], [[]])[0].input_ids[0]
    assert int((forged == encoder.tokenizer.eos_token_id).sum()) == 4
