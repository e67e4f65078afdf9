"""The loader: a pure function of the step, the same samples in every layout, true to the source."""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.data import handmade
from tests.data.handmade import SAMPLES, Record, photographs, pixels, shapes, stream
from wemmu.config import Curriculum
from wemmu.config.shards import LatentSettings, ShardError
from wemmu.config.task import GENERATION_TASKS, Task
from wemmu.data.collate import collate
from wemmu.data.loader import Loader, sample_id
from wemmu.data.shards import DecodedRecord, ShardStream
from wemmu.prompts import PromptEncoder
from wemmu.types import IGNORE_INDEX, Batch

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


def test_a_step_with_accumulation_pads_less_and_has_the_same_samples(make_loader: MakeLoader) -> None:
    """Micro-batches hold texts of similar length; a step of one micro-batch keeps its order."""
    padded = Counter[str]()
    for step in range(12):
        whole, parts = make_loader(micro_batch=8).micro_batches(step), make_loader(micro_batch=2).micro_batches(step)
        (row,) = whole
        assert sorted(ids(parts)) == sorted(ids(whole))
        for name, batches in {
            "sorted": [batch.prompts.mask for batch in parts],
            "as drawn": list(row.prompts.mask.split(2)),
        }.items():
            padded[name] += sum(int(m.any(0).sum()) * len(m) - int(m.sum()) for m in batches)
        lengths = [int(n) for batch in parts for n in batch.prompts.mask.sum(1)]
        assert min(lengths[-2:]) >= max(lengths[:2])
    assert padded["sorted"] < padded["as drawn"] / 2


def test_a_step_is_decoded_one_micro_batch_at_a_time(make_loader: MakeLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for owner, name in ((ShardStream, "_decoded"), (Loader, "_collate")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, real=real, name=name: done.append(name) or real(*a))
    make_loader(micro_batch=2).micro_batches(0)
    assert done == ["_decoded", "_decoded", "_collate"] * 4


def test_a_samples_contrastive_partner_is_the_next_of_the_global_batch_in_every_layout(make_loader: MakeLoader) -> None:
    contrast = {"kind": "contrastive"}

    def partners(world: int, micro: int, step: int) -> dict[int, tuple[int, int]]:
        """Sample -> its partner and what that looks like."""
        found = {}
        for rank in range(world):
            for batch in make_loader(rank, world, micro_batch=micro, objective=contrast).micro_batches(step):
                others = torch.cat([batch.sample_ids, batch.negatives.sample_ids])[batch.negatives.index]
                looks = torch.cat([batch.target, batch.negatives.target])[batch.negatives.index]
                for own, other, look in zip(batch.sample_ids.tolist(), others.tolist(), looks, strict=True):
                    found[own] = other, int(look.sum())
        return found

    for step in range(4):
        whole = partners(1, 8, step)
        assert sorted(other for other, _ in whole.values()) == sorted(whole), "every sample is one partner"
        assert all(own != other for own, (other, _) in whole.items())
        for world, micro in ((1, 2), (2, 1), (2, 4), (4, 2), (8, 1)):
            assert partners(world, micro, step) == whole


def test_the_whole_step_has_one_task_and_steps_follow_the_mixture(make_loader: MakeLoader) -> None:
    ranks, tasks = [make_loader(rank, 2) for rank in range(2)], Counter[Task]()
    for step in range(60):
        batches = [batch for rank in ranks for batch in rank.micro_batches(step)]
        tasks.update({batch.task for batch in batches})
        assert all(batch.negatives is None for batch in batches), "without contrast, nobody has a partner"
    assert tasks.total() == 60
    for task, weight in {"t2i": 0.3, "reconstruction": 0.15, "unconditional": 0.05, "edit": 0.3}.items():
        assert abs(tasks[Task(task)] - 60 * weight) <= 2


def test_every_sample_is_seen_once_before_any_is_seen_twice(make_loader: MakeLoader) -> None:
    loader = make_loader(mixture={"edit": 1.0, "t2i": 0.5}, micro_batch=8)
    seen = {Task.EDIT: [], Task.T2I: []}
    for step in range(60):
        batches = loader.micro_batches(step)
        seen[batches[0].task] += ids(batches)
    for task, size in ((Task.EDIT, 26), (Task.T2I, 30)):
        assert len(seen[task]) > 4 * size
        everything = {sample_id(record.id) for record in shapes(task, size)}
        for epoch in range(4):
            assert sorted(seen[task][epoch * size : (epoch + 1) * size]) == sorted(everything)


def test_stages_and_seeds_see_other_orders(shards: Path, encoder: PromptEncoder, curriculum_of: CurriculumOf) -> None:
    run = curriculum_of(shards, mixture={"t2i": 1.0}).stage_run("only")
    runs = [run, run.changed({"stage.name": "other"}), run.changed({"seed": 4})]
    assert len({tuple(ids(Loader(r, encoder, TOKEN_PX).micro_batches(0))) for r in runs}) == 3


@pytest.mark.parametrize("task", GENERATION_TASKS)
def test_batches_hold_what_was_written(make_loader: MakeLoader, encoder: PromptEncoder, task: Task) -> None:
    records = {sample_id(record.id): record for record in shapes(task, SAMPLES[task])}
    for batch in make_loader(mixture={task: 1.0}).micro_batches(3):
        assert batch.target is not None
        assert batch.latents is None
        for b, number in enumerate(batch.sample_ids.tolist()):
            record = records[number]
            inputs = [pixels(image) for image in record.images]
            assert batch.images[b].shape == (len(inputs), 3, 32, 32)
            assert all(map(np.array_equal, batch.images[b], inputs))
            assert np.array_equal(batch.target[b], pixels(record.target) if record.target else inputs[0])
            row = batch.prompts.input_ids[b][batch.prompts.mask[b]]
            assert record.prompt in encoder.tokenizer.decode(row)
            # 32 px are 2 x 2 tokens of 16 px.
            assert (row == encoder.image_token_id).sum() == 4 * len(inputs)


# ----------------------------------------------------------------------------------------------------------- buckets
# Streams of several shapes and numbers of inputs, photographs and drawings.
BUCKETS = {
    stream(Task.T2I, 32, 32): photographs(23, (32, 32)),
    stream(Task.T2I, 32, 48): photographs(11, (32, 48)),
    stream(Task.T2I, 48, 32): shapes(Task.T2I, 6, (48, 32)),
    stream(Task.MULTI_EDIT, 32, 32): shapes(Task.MULTI_EDIT, 9),
    stream(Task.MULTI_EDIT, 32, 32, inputs=3): [
        Record(f"three {n}", "put all of them together", (p.target,) * 3, p.target)
        for n, p in enumerate(photographs(5))
    ],
}
BUCKET_MIXTURE = {"t2i": 0.5, "multi_edit": 0.2, "unconditional": 0.3}


@pytest.fixture(scope="module")
def buckets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("buckets")
    handmade.write(root, BUCKETS, "JPEG", partition=4)
    return root


@pytest.fixture(scope="module")
def load_buckets(buckets: Path, encoder: PromptEncoder, curriculum_of: CurriculumOf) -> MakeLoader:
    def make(rank: int = 0, world: int = 1, **changes: object) -> Loader:
        changes = {"mixture": BUCKET_MIXTURE, "steps": 200} | changes
        return Loader(curriculum_of(buckets, **changes).stage_run("only"), encoder, TOKEN_PX, rank, world)

    return make


def test_a_task_divides_its_weight_by_the_sizes_of_its_streams(load_buckets: MakeLoader) -> None:
    loader = load_buckets(steps=400)
    shares = Counter(dict(zip([s.name for s in loader.settings], np.bincount(loader._stream_of) / 400, strict=True)))
    for task, weight in BUCKET_MIXTURE.items():
        source = "t2i" if task == "unconditional" else task
        own = {s.name: len(records) for s, records in BUCKETS.items() if s.task == source}
        for name, size in own.items():
            share = shares[name.replace("t2i", "unconditional") if task == "unconditional" else name]
            # The bound of `schedule`, for 400 draws of 8 streams.
            assert abs(share - weight * size / sum(own.values())) <= (1 + 8) / 400


def test_batches_have_the_shape_of_their_stream(load_buckets: MakeLoader) -> None:
    loader, shapes_seen = load_buckets(), set()
    for step in range(60):
        for batch in loader.micro_batches(step):
            assert batch.target is not None
            assert batch.images.shape[2:] == batch.target.shape[1:]
            shapes_seen.add((batch.task, batch.images.shape[1], *batch.target.shape[2:]))
    sizes = [(32, 32), (32, 48), (48, 32)]
    expected = {(task, 0, *size) for task in (Task.T2I, Task.UNCONDITIONAL) for size in sizes}
    assert shapes_seen == expected | {(Task.MULTI_EDIT, inputs, 32, 32) for inputs in (2, 3)}


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([(b, w, m) for b in (4, 6, 12) for w in (1, 2, 3, 4, 6) for m in (1, 2, 3) if b % (w * m) == 0]),
    st.sampled_from([0, 2]),
)
def test_in_every_layout_an_epoch_holds_every_sample_once(
    load_buckets: MakeLoader, layout: tuple[int, int, int], workers: int
) -> None:
    """Of every stream, whatever its shape, the global batch, the numbers of ranks and of threads."""
    batch, world, micro = layout
    ranks = [
        load_buckets(rank, world, global_batch=batch, micro_batch=micro, workers=workers, steps=40)
        for rank in range(world)
    ]
    records = {(s.task, s.inputs, 3, s.height, s.width): r for s, r in BUCKETS.items()}
    records |= {(Task.UNCONDITIONAL, *key[1:]): r for key, r in records.items() if key[0] == Task.T2I}
    seen = {kind: Counter({sample_id(r.id): 0 for r in each}) for kind, each in records.items()}
    for step in range(40):
        parts = [batch for rank in ranks for batch in rank.micro_batches(step)]
        drawn = seen[parts[0].task, *parts[0].images.shape[1:]]
        drawn.update(ids(parts))
        assert max(drawn.values()) - min(drawn.values()) <= 1, "one was seen again before another"
    for loader in ranks:
        loader.close()
    assert [drawn.keys() for drawn in seen.values()] == [{sample_id(r.id) for r in each} for each in records.values()]


def test_stored_latents_come_with_their_images(
    tmp_path: Path, encoder: PromptEncoder, curriculum_of: CurriculumOf
) -> None:
    """The latents of an image are here its first pixels, so that they tell to which image they belong."""
    kind = LatentSettings(vae="0" * 64, scaling_factor=1, dtype="float32", channels=3, rows=1, columns=1)

    def with_latents(record: Record) -> Record:
        images = [record.target, *record.images]
        return Record(
            record.id, record.prompt, record.images, record.target,
            tuple(pixels(p)[:, 0, 0].astype("<f4").tobytes() for p in images),
        )  # fmt: skip

    records = {stream(task, latents=kind): shapes(task, 12) for task in (Task.T2I, Task.MULTI_EDIT)}
    handmade.write(tmp_path, {s: [with_latents(r) for r in found] for s, found in records.items()})
    run = curriculum_of(tmp_path, mixture={"t2i": 1, "multi_edit": 1, "reconstruction": 1}).stage_run("only")
    loader, tasks = Loader(run, encoder, TOKEN_PX), set()
    for step in range(6):
        for batch in loader.micro_batches(step):
            assert batch.latents is not None
            assert torch.equal(batch.latents.target[..., 0, 0], batch.target[..., 0, 0].float())
            assert torch.equal(batch.latents.images[..., 0, 0], batch.images[..., 0, 0].float())
            moved = batch.to("meta").latents
            assert moved.target.is_meta
            assert moved.images.is_meta
            tasks.add(batch.task)
    assert len(tasks) == 3


# ------------------------------------------------------------------------------------------------ damage, time, errors
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_a_reading_thread_reaches_the_caller(
    shards: Path, tmp_path: Path, encoder: PromptEncoder, curriculum_of: CurriculumOf, workers: int
) -> None:
    root = Path(shutil.copytree(shards, tmp_path / "shards"))
    run = curriculum_of(root, mixture={"t2i": 1.0}, workers=workers).stage_run("only")
    loader = Loader(run, encoder, TOKEN_PX)
    loader.micro_batches(0)
    for shard in root.rglob("t2i/**/*.mds"):
        shard.unlink()
    with pytest.raises(ShardError, match=r"t2i/32/32x32/0000\d/shard.00000.mds is missing"):
        loader.micro_batches(40)
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_record_that_no_batch_can_hold_is_named_with_its_shard(
    shards: Path, encoder: PromptEncoder, curriculum_of: CurriculumOf, workers: int
) -> None:
    """Whatever an encoder refuses."""
    bad = shapes(Task.T2I, SAMPLES[Task.T2I])[17]

    class Picky(PromptEncoder):
        def token_ids(self, text: str, grids: Sequence[tuple[int, int]]) -> list[int]:
            if text == bad.prompt:
                raise ValueError("no words for it")
            return super().token_ids(text, grids)

    run = curriculum_of(shards, mixture={"t2i": 1.0}, workers=workers).stage_run("only")
    loader = Loader(run, Picky(encoder._processor), TOKEN_PX)
    with pytest.raises(ShardError, match=r"the record shapes/.*/17 in record 3 of .*t2i/32/32x32/00002/.*: no words"):
        [loader.micro_batches(step) for step in range(30)]
    loader.close()


@pytest.mark.filterwarnings("ignore:data.damaged is skip")
@pytest.mark.parametrize("workers", [0, 3])
def test_what_was_skipped_is_told_and_the_run_is_the_same_again(
    shards: Path, tmp_path: Path, encoder: PromptEncoder, curriculum_of: CurriculumOf, workers: int
) -> None:
    root = Path(shutil.copytree(shards, tmp_path / "shards"))
    (root / "edit/32/32x32/00002/shard.00000.mds").unlink()
    run = curriculum_of(root, mixture={"edit": 1.0}, damaged="skip", workers=workers).stage_run("only")
    first, second = Loader(run, encoder, TOKEN_PX), Loader(run, encoder, TOKEN_PX)
    assert first.skipped == {}
    steps = [first.micro_batches(step) for step in range(13)]
    assert all(same(second.micro_batches(step), steps[step]) for step in reversed(range(13)))
    first.close()
    second.close()
    # 13 steps of 8 are 4 epochs of 26.
    counts = Counter(i for step in steps for i in ids(step))
    lost = {sample_id(record.id) for record in shapes(Task.EDIT, 26)[14:21]}
    assert not lost & counts.keys()
    assert counts[sample_id(shapes(Task.EDIT, 26)[21].id)] == 4 * 8
    if not workers:
        assert first.skipped == {("edit/32/32x32/00002/shard.00000.mds", record): 4 for record in range(7)}


def test_the_time_that_the_caller_waited_is_told(make_loader: MakeLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(self: Loader, step: int) -> list[Batch]:
        time.sleep(0.2)
        return []

    monkeypatch.setattr(Loader, "_read", slowly)
    inline, ahead = make_loader(), make_loader(workers=1)
    for step in range(2):
        inline.micro_batches(step)
        assert 0.2 <= inline.waited < 2
    ahead.micro_batches(0)
    time.sleep(1)
    ahead.micro_batches(1)
    assert ahead.waited < 0.1
    ahead.close()


def test_steps_outside_the_stage_and_ranks_that_cannot_share_the_batch_are_refused(make_loader: MakeLoader) -> None:
    for step in (-1, 60):
        with pytest.raises(ValueError, match="steps 0 to 59"):
            make_loader().micro_batches(step)
    with pytest.raises(ValueError, match="not a multiple of the 3 ranks"):
        make_loader(0, 3)


def test_captions_are_what_is_asked_for_if_all_of_a_batch_have_one(encoder: PromptEncoder) -> None:
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    worded = DecodedRecord("a", "a red circle", image[None][:0], image, None).as_task(Task.CAPTION)
    settings_, silent = stream(Task.CAPTION, inputs=1), replace(worded, answer="")
    with_words = collate(settings_, [worded, worded], encoder, 16, "what is it?")
    assert with_words.images.shape == (2, 1, 3, 32, 32)
    labels = with_words.labels[0][with_words.labels[0] != IGNORE_INDEX]
    assert encoder.tokenizer.decode(labels[:-1]) == "a red circle"
    without = collate(settings_, [worded, silent], encoder, 16, "what is it?")
    assert without.labels is None
    for batch in (with_words, without):
        assert "what is it?" in encoder.tokenizer.decode(batch.prompts.input_ids[0])
    assert "red" not in encoder.tokenizer.decode(without.prompts.input_ids[0])


def test_sample_ids_are_63_bit_and_distinct() -> None:
    numbers = {sample_id(f"record {n}") for n in range(2000)}
    assert len(numbers) == 2000
    assert min(numbers) >= 0
    assert 2**62 < max(numbers) < 2**63
