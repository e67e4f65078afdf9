"""The planned bytes are those of the real engine, of a real checkpoint and of what autograd really keeps."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tests.models.world import make_batch
from tests.planning.worlds import MINIATURE, PAPER, curriculum_with, on
from wemmu.checkpoint import store
from wemmu.checkpoint.manifest import Origin
from wemmu.config import Curriculum, Task
from wemmu.config.schema import Backbones
from wemmu.parallel import zero3
from wemmu.parallel.single import SingleEngine
from wemmu.planning.activations import activations
from wemmu.planning.backbones import read_sizes
from wemmu.planning.flops import Assumptions, sample_of
from wemmu.planning.load import BUCKET, LIVE, Degrees, Load
from wemmu.planning.parameters import count
from wemmu.planning.plan import StagePlan, plan
from wemmu.prompts import PromptEncoder
from wemmu.recipes.wemmu.loss import FlowMatchingLoss
from wemmu.recipes.wemmu.model import WeMMU

# The fixture `model` has a smaller table than the shipped curriculum.
TABLE = "bridge.position_table=8"


def stage_plan(curriculum: Curriculum, stage: str, world: int = 1, tp: int = 1, pp: int = 1) -> StagePlan:
    stages = plan(curriculum, on(world, tp, pp), Assumptions()).stages
    return next(one for one in stages if one.name == stage)


def size(tensors: dict[str, Tensor]) -> int:
    return sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        ("stage1", ()),
        ("stage2", ()),
        # Carries the rest of the bridge, and the DiT that stage2 trained.
        ("stage3", ("stages.stage3.trains=[position_mlp]", "stages.stage3.optimizer.ema_decay=0.999")),
    ],
)
def test_a_stages_engine_and_checkpoint_are_as_large_as_planned(
    model: WeMMU, backbones: Backbones, tmp_path: Path, stage: str, overrides: tuple[str, ...]
):
    curriculum = curriculum_with(MINIATURE, backbones, TABLE, *overrides)
    planned = stage_plan(curriculum, stage)
    config = curriculum.stage_run(stage).stage
    model.freeze_all_but(config.trains)
    engine = SingleEngine(
        model, FlowMatchingLoss(model, curriculum.stage_run(stage)), config.optimizer, config.global_batch
    )
    state = engine.state()
    assert engine.parameters == (planned.trained, planned.frozen)
    memory = planned.gpu_memory
    assert memory["moments"] == size(state.exp_avg) + size(state.exp_avg_sq)
    assert memory["moving average"] == size(state.ema) == (stage == "stage3") * size(state.weights)
    # Weights in fp32 are their own master.
    assert (memory["working weights"], memory["master weights"]) == (size(state.weights), 0)
    assert memory["frozen weights"] == sum(p.nbytes for p in model.parameters() if not p.requires_grad)

    carried = {
        name: p.detach()
        for name, p in model.named_parameters()
        if not p.requires_grad and (name.startswith("bridge.") or (name.startswith("dit.") and stage == "stage3"))
    }
    made = store.save(tmp_path, state, carried, Origin(stage, 0, config.resolution, frozen={}))
    on_disk = sum(file.stat().st_size for file in made.rglob("*") if file.is_file())
    tensors = size(state.weights) + size(state.exp_avg) + size(state.exp_avg_sq) + size(state.ema) + size(carried)
    assert planned.checkpoint == tensors
    # torch writes each tensor as an archive of its own, with about 1.9 kB around it: nothing at the published sizes.
    entries = 3 * len(state.weights) + len(state.ema) + len(carried)
    assert on_disk == pytest.approx(planned.checkpoint + 1900 * entries, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("stage", "task"), [("stage1", Task.T2I), ("stage3", Task.EDIT)])
def test_autograd_keeps_what_is_planned(
    model: WeMMU,
    encoder: PromptEncoder,
    backbones: Backbones,
    stage: str,
    task: Task,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
):
    model = deepcopy(model).to(dtype)
    typed = backbones.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    curriculum = curriculum_with(MINIATURE, typed, TABLE, "stages.*.resolution=64")
    run, sizes = curriculum.stage_run(stage), read_sizes(backbones)
    px = run.stage.resolution
    batch = make_batch(encoder, [0, 4], task, (px, px))
    text = batch.prompts.input_ids.shape[1] - batch.images.shape[1] * (px // sizes.vision.token_px) ** 2
    sample = sample_of(task, px, sizes, curriculum, Assumptions(text, text))
    load = Load(curriculum, run.stage, sizes, {}, Degrees(1, 1, 1), 2, 1, (sample,))
    planned = activations(sample, load, checkpointing=False)

    model.freeze_all_but(run.stage.trains)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in weights:
            kept[pointer] = tensor
        return tensor

    # The plan is for a batch with padding; without any, heads share keys and values and less is kept.
    prefix = replace(model.vlm.prefix(batch.prompts, batch.images), padded=True)
    monkeypatch.setattr(model.vlm, "prefix", lambda *_: prefix)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        _loss = FlowMatchingLoss(model, run)(batch, 0)
    measured = sum(t.untyped_storage().nbytes() for t in kept.values())
    # A frozen DiT keeps nothing of its first block's self-attention: 5 % here, where there are 6 blocks and not 20.
    assert measured == pytest.approx(planned, rel=0.06 if stage == "stage1" else 0.02)


def test_sharding_divides_what_can_be_trained_and_nothing_else(published: Backbones):
    curriculum = curriculum_with(PAPER, published)
    one, many = (stage_plan(curriculum, "stage2", world).gpu_memory for world in (8, 64))
    for name in ("working weights", "master weights", "moments"):
        assert one[name] == pytest.approx(8 * many[name])
    bucket = 4 * BUCKET
    assert one["gradients"] - bucket == pytest.approx(8 * (many["gradients"] - bucket))
    for name in ("frozen weights", "gathered", "activations"):
        assert one[name] == pytest.approx(many[name])


def test_zero3_keeps_and_sums_as_much_at_a_time_as_is_planned():
    assert (LIVE, BUCKET) == (zero3.LIVE, zero3.BUCKET)


def test_the_bridge_is_sharded_over_all_ranks_and_the_dit_over_its_copies(published: Backbones):
    curriculum = curriculum_with(PAPER, published)
    flat, split = (stage_plan(curriculum, "stage2", 64, tp=tp, pp=pp) for tp, pp in ((1, 1), (2, 2)))
    # Four ranks share a DiT, of which there are sixteen: each has as much of it as before, but for its two ends.
    assert split.gpu_memory["moments"] == pytest.approx(flat.gpu_memory["moments"], rel=0.05)
    assert (split.micro_batch, split.accumulation) == (flat.micro_batch, flat.accumulation)


def test_state_of_the_published_size(published: Backbones):
    """2.78 B parameters trained in stage 1, 4.38 B in stage 2: 33 and 53 GB of fp32 weights and moments."""
    stages = plan(curriculum_with(PAPER, published), on(64), Assumptions()).stages
    assert [s.checkpoint / 1e9 for s in stages[:2]] == pytest.approx([33, 53], rel=0.03)
    assert [s.trained / 1e9 for s in stages[:2]] == pytest.approx([2.78, 4.38], rel=0.03)


def test_the_dit_is_split_by_both_degrees(published: Backbones):
    sizes, curriculum = read_sizes(published), curriculum_with(PAPER, published)
    whole, rung = count(sizes, curriculum.recipe.bridge), curriculum.stages[0].rungs[0]
    one, four = (Load(curriculum, rung, sizes, whole, d, 1, 1, ()) for d in (Degrees(1, 1, 1), Degrees(4, 2, 2)))
    assert one.share == whole
    assert 0.25 < four.share["dit"] / whole["dit"] < 0.30


def test_checkpointing_keeps_little(published: Backbones):
    for stage in plan(curriculum_with(PAPER, published), on(64), Assumptions()).stages:
        assert stage.gpu_memory["checkpointed activations"] < 0.1 * stage.gpu_memory["activations"]
        assert stage.gpu_total_checkpointed < stage.gpu_total


def test_few_samples_hold_most_on_the_way_back_through_the_bridge(published: Backbones):
    """Recomputing, what a split model holds most of is the gradients of a layer that are being reduced."""
    resting = "stages.stage3.trains=[position_mlp]"
    one, _, three, _ = plan(curriculum_with(PAPER, published, resting), on(64, tp=2, pp=2), Assumptions()).stages
    states = sum(one.gpu_memory[name] for name in ("frozen weights", "working weights", "moments", "gradients"))
    backward = one.gpu_memory["checkpointed backward of the bridge"]
    assert backward > one.gpu_memory["gathered"] + one.gpu_memory["checkpointed activations"]
    # Of so many samples the VAE's maps are larger still.
    assert one.gpu_total_checkpointed == pytest.approx(states + max(backward, one.gpu_memory["VAE at work"]))
    assert three.gpu_memory["backward of the bridge"] == 0
