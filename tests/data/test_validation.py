"""What is held out is never trained on, at any resolution and in any task, and is always the same."""

from pathlib import Path

import pytest

from tests.data.handmade import Record, make_curriculum, shapes, stream, write
from wemmu.config import StageRun
from wemmu.config.shards import ShardError, StreamSettings
from wemmu.config.task import Task
from wemmu.data.loader import Loader, sample_id
from wemmu.data.streams import spread
from wemmu.data.validation import HeldOut
from wemmu.prompts import PromptEncoder

TOKEN_PX, NUMBER = 16, 5
# At 64 px there are fewer, so that other places of the stream hold the same images.
SIZES = {(Task.T2I, 32): 30, (Task.T2I, 64): 23, (Task.EDIT, 32): 24, (Task.EDIT, 64): 18}
MIXTURE = {"t2i": 0.4, "reconstruction": 0.3, "edit": 0.3}


def records(task: Task, px: int) -> list[Record]:
    """An image bears one id at all resolutions; the highest has the last of them."""
    found = [Record(f"{task}/{i}", r.prompt, r.images, r.target) for i, r in enumerate(shapes(task, 30, (px, px)))]
    return found[-SIZES[task, px] :]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    streams: dict[StreamSettings, list[Record]] = {
        stream(task, px, px).model_copy(update={"resolution": px}): records(task, px) for task, px in SIZES
    }
    write(root, streams)
    return root


def run_at(shards: Path, px: int, validation: int = NUMBER) -> StageRun:
    config = make_curriculum(shards, mixture=MIXTURE, resolution=px, steps=40)
    return config.changed({"data.validation": validation}).stage_run("only")


def trained_on(run: StageRun, encoder: PromptEncoder) -> set[int]:
    loader = Loader(run, encoder, TOKEN_PX)
    return {i for step in range(40) for batch in loader.micro_batches(step) for i in batch.sample_ids.tolist()}


def held_out(run: StageRun, encoder: PromptEncoder, part: int = 0, parts: int = 1) -> list[tuple[int, list[int]]]:
    """Stream and ids of the samples that count, batch by batch."""
    batches = HeldOut(run, encoder, TOKEN_PX, part, parts).batches()
    return [(number, batch.sample_ids[counted].tolist()) for number, batch, counted in batches]


def test_what_is_held_out_at_one_resolution_is_trained_on_at_none(shards: Path, encoder: PromptEncoder):
    held = {i for px in (32, 64) for _, ids in held_out(run_at(shards, px), encoder) for i in ids}
    for px in (32, 64):
        here = {sample_id(record.id) for task in (Task.T2I, Task.EDIT) for record in records(task, px)}
        # 40 steps of 8 are several epochs: all the rest is trained on.
        assert trained_on(run_at(shards, px), encoder) == here - held
    # The two resolutions do not hold out the same images; else the test would prove less.
    per_resolution = [{i for _, ids in held_out(run_at(shards, px), encoder) for i in ids} for px in (32, 64)]
    assert per_resolution[0] != per_resolution[1]
    assert all(len(ids) == 2 * NUMBER - (px == 64) for ids, px in zip(per_resolution, (32, 64), strict=True))


def test_without_it_everything_is_trained_on(shards: Path, encoder: PromptEncoder):
    assert trained_on(run_at(shards, 32, validation=0), encoder) == {
        sample_id(record.id) for task in (Task.T2I, Task.EDIT) for record in records(task, 32)
    }


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_parts_go_through_as_many_batches_and_count_each_sample_once(shards: Path, encoder: PromptEncoder, parts: int):
    run = run_at(shards, 32)
    assert HeldOut(run, encoder, TOKEN_PX).weights == pytest.approx([0.4, 0.3, 0.3]), "those of the mixture"
    whole = held_out(run, encoder)
    shared = [held_out(run, encoder, part, parts) for part in range(parts)]
    assert len({tuple(number for number, _ in one) for one in shared}) == 1
    for stream_number in range(3):
        ids = [i for one in shared for number, found in one if number == stream_number for i in found]
        assert ids == [i for number, found in whole if number == stream_number for i in found]


def test_a_task_of_which_nothing_can_be_held_out_is_refused(tmp_path: Path, encoder: PromptEncoder):
    write(tmp_path, {stream(Task.T2I): shapes(Task.T2I, 3), stream(Task.EDIT): shapes(Task.EDIT, 8)})
    with pytest.raises(ShardError, match="no record of t2i, reconstruction at 32 px is held out"):
        HeldOut(run_at(tmp_path, 32), encoder, TOKEN_PX)


@pytest.mark.parametrize(("size", "number"), [(4, 1), (7, 1), (30, 5), (1000, 64), (3, 0), (100, 0)])
def test_places_are_distinct_inside_and_no_more_than_a_quarter(size: int, number: int):
    places = spread(size, number).tolist()
    assert len(set(places)) == len(places) == min(number, size // 4)
    assert all(0 <= place < size for place in places)
