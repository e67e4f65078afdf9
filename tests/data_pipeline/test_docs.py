"""What docs/data.md says can be typed."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from data_pipeline.__main__ import app
from data_pipeline.sources import SOURCES
from wemmu.config import prepare

TEXT = Path("docs/data.md").read_text()
EXAMPLES = [yaml.safe_load(example) for example in re.findall(r"`(\{kind: .*?\}+)`", TEXT)]


def test_every_kind_of_source_has_an_example() -> None:
    assert {example["kind"] for example in EXAMPLES} == set(SOURCES)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e["kind"])
def test_the_examples_are_valid(example: dict) -> None:
    TypeAdapter(prepare.Source).validate_python(example)


def test_the_commands_exist() -> None:
    named = set(re.findall(r"wemmu data (\w+)", TEXT))
    assert named == {command.callback.__name__ for command in app.registered_commands}
