"""A tiny data set of all tasks, and a tokenizer made on the spot."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.handmade import all_tasks, make_curriculum, write
from wemmu.config import Curriculum
from wemmu.prompts import PromptEncoder
from wemmu.shapes.processor import save_processor


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete data set of all tasks at 32 px; not to be changed."""
    root = tmp_path_factory.mktemp("shards")
    write(root, all_tasks())
    return root


@pytest.fixture(scope="session")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("processor")
    save_processor(directory)
    return directory


@pytest.fixture(scope="session")
def encoder(processor: Path) -> PromptEncoder:
    return PromptEncoder(processor)


@pytest.fixture(scope="session")
def curriculum_of() -> Callable[..., Curriculum]:
    return make_curriculum
