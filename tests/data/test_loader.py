"""The loader: a pure function of the step, the same samples in every layout, true to the source."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.sources.shapes import Shapes
from wemmu.config import Curriculum
from wemmu.config.task import GENERATION_TASKS, Task
from wemmu.data import Loader
from wemmu.data.loader import sample_id
from wemmu.prompts import PromptEncoder
from wemmu.types import Batch

TOKEN_PX = 16
CurriculumOf = Callable[..., Curriculum]
MakeLoader = Callable[..., Loader]


@pytest.fixture
def make_loader(shards: Path, encoder: PromptEncoder, curriculum_of: CurriculumOf) -> MakeLoader:
    def make(rank: int = 0, world: int = 1, **changes: object) -> Loader:
        run = curriculum_of(shards, **changes).stage_run("only")
        return Loader(run, encoder, TOKEN_PX, rank, world)

    return make


def ids(batches: list[Batch]) -> list[int]:
    return torch.cat([batch.sample_ids for batch in batches]).tolist()


def same(one: list[Batch], other: list[Batch]) -> bool:
    def tensors(batch: Batch) -> list[Tensor]:
        assert batch.target is not None
        prompts = batch.prompts
        return [batch.sample_ids, batch.images, batch.target, prompts.input_ids, prompts.mask, prompts.positions]

    return len(one) == len(other) and all(
        a.task == b.task and all(map(torch.equal, tensors(a), tensors(b))) for a, b in zip(one, other, strict=True)
    )


def test_a_step_is_the_same_whatever_was_read_before(make_loader: MakeLoader) -> None:
    one_way = make_loader()
    in_order = [one_way.micro_batches(step) for step in range(20)]
    fresh = make_loader()
    for step in (13, 2, 19, 0, 2):
        assert same(fresh.micro_batches(step), in_order[step])


@pytest.mark.parametrize("workers", [1, 3])
def test_reading_ahead_changes_nothing(make_loader: MakeLoader, workers: int) -> None:
    inline, ahead = make_loader(), make_loader(workers=workers)
    for step in (0, 1, 2, 10, 11, 4, 58, 59):
        assert same(inline.micro_batches(step), ahead.micro_batches(step))
    ahead.close()


def test_ranks_share_out_the_global_batch_alike_in_every_layout(make_loader: MakeLoader) -> None:
    """Numbers of ranks and micro-batches change who reads a sample, never which samples a step has."""
    whole = make_loader(micro_batch=8)
    for world, micro in ((1, 2), (2, 1), (2, 4), (4, 2), (8, 1)):
        ranks = [make_loader(rank, world, micro_batch=micro) for rank in range(world)]
        for step in range(12):
            parts = [rank.micro_batches(step) for rank in ranks]
            assert all(len(part) == 8 // (world * micro) for part in parts)
            assert Counter(i for part in parts for i in ids(part)) == Counter(ids(whole.micro_batches(step)))


def test_the_whole_step_has_one_task(make_loader: MakeLoader) -> None:
    ranks = [make_loader(rank, 2) for rank in range(2)]
    for step in range(12):
        assert len({batch.task for rank in ranks for batch in rank.micro_batches(step)}) == 1


def test_steps_follow_the_mixture(make_loader: MakeLoader) -> None:
    loader = make_loader()
    tasks = Counter(loader.micro_batches(step)[0].task for step in range(60))
    for task, weight in {"t2i": 0.3, "reconstruction": 0.15, "unconditional": 0.05, "edit": 0.3}.items():
        assert abs(tasks[Task(task)] - 60 * weight) <= 2


def test_every_sample_is_seen_once_before_any_is_seen_twice(make_loader: MakeLoader) -> None:
    loader = make_loader(mixture={"edit": 1.0, "t2i": 0.5})
    seen = {Task.EDIT: [], Task.T2I: []}
    for step in range(60):
        batches = loader.micro_batches(step)
        seen[batches[0].task] += ids(batches)
    for task, size in ((Task.EDIT, 26), (Task.T2I, 30)):
        assert len(seen[task]) > 4 * size
        everything = {sample_id(f"shapes/5/{task}/{number}") for number in range(size)}
        for epoch in range(4):
            assert sorted(seen[task][epoch * size : (epoch + 1) * size]) == sorted(everything)


def test_stages_and_seeds_see_other_orders(shards: Path, encoder: PromptEncoder, curriculum_of: CurriculumOf) -> None:
    run = curriculum_of(shards, mixture={"t2i": 1.0}).stage_run("only")
    other_stage = run.model_copy(update={"stage": run.stage.model_copy(update={"name": "other"})})
    runs = [run, other_stage, run.model_copy(update={"seed": 4})]
    assert len({tuple(ids(Loader(r, encoder, TOKEN_PX).micro_batches(0))) for r in runs}) == 3


@pytest.mark.parametrize("task", GENERATION_TASKS)
def test_batches_hold_what_the_source_made(make_loader: MakeLoader, encoder: PromptEncoder, task: Task) -> None:
    records = {
        sample_id(record.id): record for record in (Shapes().record(task, 5, number, (32, 32)) for number in range(30))
    }
    for batch in make_loader(mixture={task: 1.0}).micro_batches(3):
        assert batch.target is not None
        for b, number in enumerate(batch.sample_ids.tolist()):
            record = records[number]
            inputs = [pixels(image) for image in record.images]
            assert batch.images[b].shape == (len(inputs), 3, 32, 32)
            assert all(map(torch.equal, batch.images[b], inputs))
            assert torch.equal(batch.target[b], pixels(record.target) if record.target else inputs[0])
            row = batch.prompts.input_ids[b][batch.prompts.mask[b]]
            assert record.prompt in encoder.tokenizer.decode(row)
            # 32 px are 2 x 2 tokens of 16 px.
            assert (row == encoder.image_token_id).sum() == 4 * len(inputs)


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_a_reading_thread_reaches_the_caller(
    tmp_path: Path, encoder: PromptEncoder, curriculum_of: CurriculumOf, write_without_ray: Callable, workers: int
) -> None:
    curriculum = curriculum_of(tmp_path, mixture={"t2i": 1.0}, workers=workers)
    write_without_ray(curriculum, partition=100)
    loader = Loader(curriculum.stage_run("only"), encoder, TOKEN_PX)
    loader.micro_batches(0)
    (shard,) = tmp_path.glob("t2i/*/*/*/*.mds")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=str(shard)):
        loader.micro_batches(40)
    loader.close()


@pytest.mark.parametrize("step", [-1, 60])
def test_steps_outside_the_stage_are_refused(make_loader: MakeLoader, step: int) -> None:
    with pytest.raises(ValueError, match="steps 0 to 59"):
        make_loader().micro_batches(step)


def test_ranks_that_cannot_share_the_global_batch_are_refused(make_loader: MakeLoader) -> None:
    with pytest.raises(ValueError, match="not a multiple of the 3 ranks"):
        make_loader(0, 3)


def test_sample_ids_are_63_bit_and_distinct() -> None:
    numbers = {sample_id(f"record {n}") for n in range(2000)}
    assert len(numbers) == 2000
    assert min(numbers) >= 0
    assert 2**62 < max(numbers) < 2**63
