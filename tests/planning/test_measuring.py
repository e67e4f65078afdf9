"""What is measured without weights is what the real model has, does and keeps."""

import math
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.models.flops import FlopCounter, kept_by_autograd
from tests.models.world import make_batch, make_model, make_ross
from tests.planning.worlds import MINIATURE, ROOT, curriculum_with
from wemmu.backbones.quantized import QuantizedLinear
from wemmu.checkpoint import store
from wemmu.checkpoint.manifest import Origin
from wemmu.config import Task, load_curriculum
from wemmu.config.schema import Backbones
from wemmu.measuring.__main__ import step, with_gradients
from wemmu.measuring.fake_world import fake_world
from wemmu.measuring.observe import Observed, PartNames
from wemmu.measuring.operators import Operators
from wemmu.parallel import zero3
from wemmu.parallel.single import SingleEngine
from wemmu.planning import layout
from wemmu.planning.ask import Item, ask
from wemmu.planning.plan import Assumptions, extrapolated, parameters_of, shape_of
from wemmu.prompts import PromptEncoder
from wemmu.recipes.lora import adapt
from wemmu.recipes.recipe import quantize
from wemmu.recipes.staged import Staged, parameters
from wemmu.recipes.wemmu.loss import FlowMatchingLoss
from wemmu.recipes.wemmu.model import WeMMU

# The fixture `model` has a smaller table than the shipped curriculum.
TABLE = "recipe.bridge.position_table=8"


def parts_of(model: Staged, **frozen: nn.Module) -> dict[str, int]:
    """Numbers of the modules that stages can train, and of further parts."""
    modules = {
        module: sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefixes))
        for module, prefixes in model.prefixes.items()
    }
    return modules | {name: sum(p.numel() for p in part.parameters()) for name, part in frozen.items()}


def test_parameters_are_those_of_loaded_models(model: WeMMU, backbones: Backbones):
    measured = parameters_of(curriculum_with(MINIATURE, backbones, TABLE))
    real = parts_of(model, vision=model.vlm.vlm.model.visual, vae=model.vae, language=model.vlm)
    real["language"] -= real["vision"]
    assert measured["parts"] == real
    ross = make_ross(backbones, head={"kind": "denoiser", "depth": 3, "width": 128, "heads": 4})
    measured = parameters_of(curriculum_with(ROOT / "configs/shapes/ross.yaml", backbones))
    real = parts_of(ross, vision=ross.vlm.model.visual, vae=ross.vae)
    real["vision"] -= real["projector"]
    assert measured["parts"] == real
    # Pixels are made without an autoencoder.
    changes = [f"backbones={{vlm: {backbones.vlm}}}", "recipe={kind: ross, target: pixels, head: {kind: linear}}"]
    measured = parameters_of(load_curriculum(ROOT / "configs/shapes/ross.yaml", changes))
    assert "vae" not in measured["parts"]
    assert {name: measured["parts"][name] for name in ("projector", "llm")} == {
        n: real[n] for n in ("projector", "llm")
    }


class Small(nn.Module):
    """A frozen and a trained linear layer, and attention with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.trained = nn.Linear(8, 16).requires_grad_(False), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q = self.trained(self.frozen(x))[:, None]
        return nn.functional.scaled_dot_product_attention(q, q, q)


def test_flops_are_those_counted_by_hand():
    batch, tokens = 2, 5
    with fake_world(Observed()) as world:
        model = Small()
        with_gradients(model)
        world.start()
        with world.watching(model, PartNames({"trained": ("trained.",)})):
            model(torch.zeros(batch, tokens, 8)).sum().backward()
    rows = batch * tokens
    assert world.flops_of["frozen", "forward"] == 2 * rows * 8 * 16
    # Nothing before it wants a gradient: that of the weight, and none of the input.
    assert world.flops_of["frozen", "backward"] == 0
    assert world.flops_of["trained", "forward"] == 2 * rows * 16 * 16
    assert world.flops_of["trained", "backward"] == 2 * rows * 16 * 16
    # Two products of [tokens, 16] and [16, tokens], and twice that for their gradients.
    assert world.flops_of["rest", "forward"] == 2 * 2 * batch * tokens**2 * 16
    assert world.flops_of["rest", "backward"] == 2 * world.flops_of["rest", "forward"]


def step_of(backbones: Backbones, stage: str, shape: dict, *overrides: str) -> dict:
    run = curriculum_with(MINIATURE, backbones, TABLE, *overrides).stage_run(stage)
    with fake_world(Observed()) as world:
        return step(world, run, shape)


@pytest.mark.parametrize(("stage", "task"), [("stage1", Task.RECONSTRUCTION), ("stage3", Task.EDIT)])
def test_a_step_does_the_work_that_the_real_model_does_and_keeps_as_much(
    model: WeMMU, encoder: PromptEncoder, backbones: Backbones, stage: str, task: Task
):
    run = curriculum_with(MINIATURE, backbones, TABLE).stage_run(stage)
    px = run.stage.resolution
    # Ids whose prompts are of one length, so that nothing is padded.
    batch = make_batch(encoder, [0, 4], task, (px, px))
    images = batch.images.shape[1]
    text = batch.prompts.input_ids.shape[1] - images * (px // model.vlm.token_px) ** 2
    shape = asdict(replace(shape_of(task, run, Assumptions()), text=text, images=images, samples=2))
    if batch.negatives is not None and stage == "stage1":
        # As in the measured batch, the partner of the last sample is in another one.
        batch = make_batch(encoder, [0, 4], task, (px, px), following=8)
    measured = step_of(backbones, stage, shape)

    model = deepcopy(model)
    model.freeze_all_but(run.stage.trains)
    with FlopCounter() as counter:
        with kept_by_autograd(model) as kept:
            loss = FlowMatchingLoss(model, run)(batch, 0).values.sum()
        loss.backward()
    assert sum(map(sum, measured["flops"].values())) == pytest.approx(counter.flops, rel=1e-3)
    assert sum(measured["kept"].values()) == pytest.approx(sum(kept.values()), rel=0.02)
    if stage == "stage3":
        again = step_of(backbones, stage, shape, "memory.checkpointing=true")
        # What is computed again is no model FLOP.
        assert again["flops"] == measured["flops"]
        assert sum(again["kept"].values()) < 0.3 * sum(measured["kept"].values())


def test_a_step_grows_linearly_with_its_samples(backbones: Backbones):
    run = curriculum_with(MINIATURE, backbones, TABLE).stage_run("stage1")
    shape = replace(shape_of(Task.T2I, run, Assumptions(20)), padded=True)
    one, two, three = (step_of(backbones, "stage1", asdict(replace(shape, samples=n))) for n in (1, 2, 3))
    expected = extrapolated(one, two, at=3)
    assert expected["flops"] == {part: pytest.approx(flops) for part, flops in three["flops"].items()}
    assert sum(expected["kept"].values()) == pytest.approx(sum(three["kept"].values()), rel=0.02)
    assert max(expected["peaks"].values()) == pytest.approx(max(three["peaks"].values()), rel=0.02)


def test_views_have_the_strides_of_real_tensors():
    def packed() -> list[Tensor]:
        """As the output of Qwen-Image becomes an image; of one sample, whether `flatten` copies depends on strides."""
        tokens = torch.empty(1, 4, 64).transpose(1, 2).unflatten(2, (2, 2))
        image = nn.functional.pixel_shuffle(tokens, 2)
        return [tokens, image, image.flatten(1)]

    def seen(tensors: list[Tensor]) -> list[object]:
        *_, image, flat = tensors
        return [*(x.stride() for x in tensors), flat.untyped_storage()._cdata == image.untyped_storage()._cdata]

    with fake_world():
        without_numbers = [seen(packed()) for _ in range(2)]
    assert without_numbers == [seen(packed())] * 2


def test_what_operators_return_is_the_same_from_memory_as_from_torch(
    backbones: Backbones, monkeypatch: pytest.MonkeyPatch
):
    """Two types, padded prompts, masks, contrast and recomputation; the second time all that can be is known."""
    backbones = backbones.model_copy(update={"dtype": "bfloat16"})
    run = curriculum_with(MINIATURE, backbones, TABLE).stage_run("stage1")
    shape = asdict(replace(shape_of(Task.RECONSTRUCTION, run, Assumptions(20)), samples=2, padded=True))
    told = [step_of(backbones, "stage1", shape, "memory.checkpointing=true") for _ in range(2)]
    monkeypatch.setattr(Operators, "__call__", Operators._ask)
    assert told == [step_of(backbones, "stage1", shape, "memory.checkpointing=true")] * 2


def size(tensors: dict[str, Tensor]) -> int:
    return sum(t.nbytes for t in tensors.values())


def test_packed_and_offloaded_weights_are_as_large_as_planned(backbones: Backbones):
    packed = "memory.quantize={vlm: nf4, pathway: int8, dit: nf4}"
    changes = (packed, "memory.offload=[vae]", "recipe.lora={pathway: {rank: 2}, dit: {rank: 2}}")
    curriculum = curriculum_with(MINIATURE, backbones, TABLE, *changes)
    run, model = curriculum.stage_run("stage3"), make_model(backbones)
    adapt(model, run.recipe, seed=0)
    model.freeze_all_but(run.stage.trains)
    full = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    quantize(run, model)
    rank = layout.RankWorkload(run, parameters_of(curriculum), layout.Degrees(1, 1, 1), 1, 1)
    vae = sum(p.nbytes for p in model.vae.parameters())
    layers = [one for one in model.modules() if isinstance(one, QuantizedLinear)]
    small = sum(one.packed.nbytes + one.scales.nbytes for one in layers)
    others = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    # Of the last block of a layer a part may be empty.
    assert rank.frozen_on(host=False) == pytest.approx(small + others - vae, rel=0.01)
    assert layout.states(rank)["frozen weights"] == rank.frozen_on(host=False) < full / 2
    assert rank.frozen_on(host=True) == layout.host(rank, 1)["offloaded weights"] == vae
    # It is there while it works, beside the largest layer unpacked.
    assert rank.unpacked == max(4 * math.prod(one.shape) for one in layers)
    peaks = {"forward vae": 5, "forward language": 7, "forward dit": 11}
    found = layout.moments(rank, {"peaks": peaks, "kept": {}}, None)
    assert found["encoders at work"].activations == 5 + vae + rank.unpacked
    assert found["layers at work"].activations == 11 + rank.unpacked


def test_a_stages_engine_and_checkpoint_are_as_large_as_planned(backbones: Backbones, tmp_path: Path):
    # Carries the rest of the bridge, and the DiT that stage2 trained.
    changes = ("stages.stage3.trains=[position_mlp]", "stages.stage3.optimizer.ema_decay=0.999")
    curriculum = curriculum_with(MINIATURE, backbones, TABLE, *changes)
    run, measured, model = curriculum.stage_run("stage3"), parameters_of(curriculum), make_model(backbones)
    memory = layout.states(layout.RankWorkload(run, measured, layout.Degrees(1, 1, 1), 1, 1))
    model.freeze_all_but(run.stage.trains)
    loss = FlowMatchingLoss(model, run)
    engine = SingleEngine(model, loss, run)
    state = engine.state()
    assert parameters(model)[0] == measured["parts"]["position_mlp"]
    assert memory["moments"] == size(state.exp_avg) + size(state.exp_avg_sq)
    assert memory["moving average"] == size(state.ema) == size(state.weights)
    # Weights in fp32 are their own master.
    assert (memory["working weights"], memory["master weights"]) == (size(state.weights), 0)
    assert memory["frozen weights"] == sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    names = ("bridge.", "dit.")
    carried = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad and n.startswith(names)}
    made = store.save(tmp_path, state, carried, Origin("stage3", 0, 64, frozen={}))
    on_disk = sum(file.stat().st_size for file in made.rglob("*") if file.is_file())
    planned = layout.checkpoint(measured, run, ["pathway", "dit"])
    # torch writes each tensor as an archive of its own, with about 1.9 kB around it: nothing at the published sizes.
    assert on_disk == pytest.approx(planned + 1900 * (4 * len(state.weights) + len(carried)), rel=0.01)


def test_slices_are_of_the_whole_and_degrees_that_cannot_be_are_refused(backbones: Backbones):
    run = curriculum_with(MINIATURE, backbones, TABLE).stage_run("stage2")
    shape = replace(shape_of(Task.T2I, run, Assumptions(20)), samples=2)
    whole, split = (ask([Item("slices", run, shape, tp, pp)])[0]["places"] for tp, pp in ((1, 1), (2, 2)))
    dit = parameters_of(curriculum_with(MINIATURE, backbones, TABLE))["parts"]["dit"]
    assert layout.numbers(whole[0], 1) == dit
    assert 0.5 < sum(layout.numbers(place, 1) for place in split) / dit < 0.7
    # Both directions of a block have their all-reduces, and a whole DiT none.
    assert whole[0]["reduced"] == whole[0]["exchanged"] == 0
    assert all(place["reduced"] and place["exchanged"] for place in split)
    assert sum(sum(place["flops"]) for place in split) == pytest.approx(sum(whole[0]["flops"]) / 2, rel=0.15)
    with pytest.raises(ValueError, match=r"cannot be split over 3 tensor ranks.*valid: 1, 2"):
        ask([Item("slices", run, shape, 3, 1)])
    with pytest.raises(ValueError, match=r"99 pipeline stages are too many for the .* blocks"):
        ask([Item("slices", run, shape, 1, 99)])


def test_zero3_keeps_and_sums_as_much_at_a_time_as_is_planned(
    model: WeMMU, backbones: Backbones, monkeypatch: pytest.MonkeyPatch
):
    assert (layout.LIVE, layout.BUCKET) == (zero3.LIVE, zero3.BUCKET)
    layers = [*model.bridge.pathway.layers, *model.dit.transformer_blocks]
    largest = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
    curriculum = curriculum_with(MINIATURE, backbones, TABLE)
    measured = parameters_of(curriculum)
    assert measured["layer"] == largest
    # Less than the whole model; the weights and gradients of a compiled layer come on top, in float32.
    monkeypatch.setattr(layout, "LIVE", 1000)
    found = []
    for compiled in (True, False):
        run = curriculum.stage_run("stage3").changed({"kernels.compile": compiled})
        rank = layout.RankWorkload(run, measured, layout.Degrees(2, 1, 1), 1, 1)
        found.append(layout.moments(rank, {"peaks": {"forward dit": 11}, "kept": {}}, None)["layers at work"])
    assert found == [layout.MemoryPeak(4 * (1000 + n), 4 * n, 11) for n in (largest, 0)]
