"""What a stage trains is what its config says: no parameter more, and none that gradients cannot reach."""

from pathlib import Path

import pytest
import torch

from tests.models.world import make_batch, make_model
from wemmu.config import StageRun, load_curriculum
from wemmu.config.schema import Backbones
from wemmu.prompts import PromptEncoder
from wemmu.recipes.wemmu.loss import FlowMatchingLoss
from wemmu.recipes.wemmu.model import WeMMU

SHAPES = load_curriculum(Path(__file__).parents[2] / "configs/shapes/curriculum.yaml")
PREFIXES = {
    "pathway": "bridge.pathway.",
    "vae_branch": "bridge.vae_branch.",
    "position_mlp": "bridge.position_mlp.",
    "queries": "bridge.queries.",
    "dit": "dit.",
}
LEARNABLE = ("pathway", "position_mlp", "queries", "dit")


def stage(name: str, trains: tuple[str, ...] | None = None) -> StageRun:
    run = SHAPES.stage_run(name)
    return run if trains is None else run.model_copy(update={"stage": run.stage.model_copy(update={"trains": trains})})


CASES = [
    *[pytest.param("noisy", stage(s.name), id=s.name) for s in SHAPES.stages],
    pytest.param("learnable_fixed", stage("stage3", LEARNABLE), id="learnable_fixed"),
    pytest.param("learnable_dynamic", stage("stage3", LEARNABLE), id="learnable_dynamic"),
]


def prepare(backbones: Backbones, design: str, run: StageRun) -> WeMMU:
    model = make_model(backbones, design, "vae_branch" in run.stage.trains)
    model.freeze_all_but(run.stage.trains)
    return model.train()


def has_no_gradient_by_its_structure(name: str) -> bool:
    """A bias of the keys of cross-attention adds the same to every score of a query, which softmax ignores."""
    return name.endswith("attn2.to_k.bias")


@pytest.mark.parametrize(("design", "run"), CASES)
def test_exactly_the_parameters_of_the_named_modules_are_trained(backbones: Backbones, design: str, run: StageRun):
    model = prepare(backbones, design, run)
    wanted = tuple(PREFIXES[module] for module in run.stage.trains)
    names = [name for name, _ in model.named_parameters()]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n in names if n.startswith(wanted)}
    for prefix in wanted:
        assert any(name.startswith(prefix) for name in names), f"{prefix} has no parameters"


@pytest.mark.parametrize(("design", "run"), CASES)
def test_gradients_reach_every_trained_parameter_and_no_other(
    backbones: Backbones, encoder: PromptEncoder, design: str, run: StageRun
):
    model = prepare(backbones, design, run)
    FlowMatchingLoss(model, run)(make_batch(encoder, [0, 1, 2]), 0).values.mean().backward()
    untouched = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
        elif has_no_gradient_by_its_structure(name):
            weight = model.get_parameter(name.replace("bias", "weight"))
            assert parameter.grad.abs().max() < 1e-3 * weight.grad.abs().max(), f"{name} is listed for no reason"
        elif parameter.grad is None or not parameter.grad.abs().max() > 0:
            untouched.append(name)
    assert untouched == []


def test_the_prompts_words_reach_the_loss(model: WeMMU, encoder: PromptEncoder):
    batch = make_batch(encoder, [0, 1])
    other = make_batch(encoder, [1, 0])
    loss = FlowMatchingLoss(model, stage("stage3"))
    with torch.no_grad():
        swapped = type(batch)(batch.task, batch.sample_ids, other.prompts, batch.images, batch.target)
        assert (loss(batch, 0).values - loss(swapped, 0).values).abs().min() > 1e-7
