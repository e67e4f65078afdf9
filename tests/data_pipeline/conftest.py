"""One data set that several test files look at."""

import shutil
from pathlib import Path

import pytest

from tests.data_pipeline.worlds import SHAPES, collection, curriculum_of, write_in_process
from wemmu.config import Curriculum


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Curriculum:
    """A curriculum whose data set is complete: photographs, edits and the miniature world. Not to be changed."""
    root = tmp_path_factory.mktemp("written")
    curriculum = curriculum_of(root / "shards", [*collection(root / "photos"), SHAPES])
    write_in_process(curriculum)
    return curriculum


@pytest.fixture
def copied(written: Curriculum, tmp_path: Path) -> Curriculum:
    """The same with a data set of its own, to be damaged."""
    shards = tmp_path / "shards"
    shutil.copytree(written.data.shards, shards)
    return written.model_copy(update={"data": written.data.model_copy(update={"shards": shards})})
