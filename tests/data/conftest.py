"""A tiny curriculum, its data set written without Ray, and a tokenizer made on the spot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.partitions import write_partition
from data_pipeline.plan import plan
from data_pipeline.write import finish, unfinished
from wemmu.config import Curriculum
from wemmu.config.shards import DataSet
from wemmu.prompts import PromptEncoder
from wemmu.shapes.processor import save_processor

PARTITION = 7
# All five tasks, with numbers of records that are multiples neither of the partition nor of the global batch.
SAMPLES = {"t2i": 30, "reconstruction": 17, "unconditional": 9, "edit": 26, "multi_edit": 13}
MIXTURE = {"t2i": 0.3, "reconstruction": 0.15, "unconditional": 0.05, "edit": 0.3, "multi_edit": 0.2}


def make_curriculum(shards: Path, **changes: Any) -> Curriculum:
    """A one-stage curriculum over `shards`; `changes` are fields of the stage, of `data` or of `memory`."""
    stage = {
        "name": "only",
        "resolution": 32,
        "steps": 60,
        "global_batch": 8,
        "trains": ["pathway"],
        "optimizer": {"lr": 1e-3},
        "mixture": MIXTURE,
    }
    data = {"shards": shards, "prepare": {"source": "shapes", "samples": SAMPLES, "seed": 5}, "workers": 0}
    memory = {"micro_batch": 2, "reference_resolution": 32}
    for field, value in changes.items():
        owner = next((d for d in (stage, data, memory) if field in d), None)
        assert owner is not None, field
        owner[field] = value
    return Curriculum.model_validate(
        {
            "name": "tiny",
            "seed": 3,
            "backbones": {"vlm": "nowhere", "sana": "nowhere"},
            "data": data,
            "memory": memory,
            "stages": [stage],
        }
    )


def write_in_process(curriculum: Curriculum, partition: int = PARTITION) -> DataSet:
    """What `data_pipeline.write.write` does, with this process in the place of Ray's workers."""
    root, wanted = curriculum.data.shards, plan(curriculum, partition)
    for missing in unfinished(root, wanted):
        write_partition(missing)
    return finish(root, wanted)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete data set of all tasks at 32 px; not to be changed."""
    root = tmp_path_factory.mktemp("shards")
    write_in_process(make_curriculum(root))
    return root


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    directory = tmp_path_factory.mktemp("processor")
    save_processor(directory)
    return PromptEncoder(directory)


@pytest.fixture(scope="session")
def curriculum_of() -> Callable[..., Curriculum]:
    return make_curriculum


@pytest.fixture(scope="session")
def write_without_ray() -> Callable[..., DataSet]:
    return write_in_process
