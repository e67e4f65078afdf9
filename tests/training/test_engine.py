"""The single-device engine is AdamW with one global clip; every other engine is measured against it."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tests.models.world import make_batch, make_model
from tests.training.runs import STAGE_RUN
from wemmu.config.schema import Backbones, Optimizer
from wemmu.config.task import Task
from wemmu.parallel.single import SingleEngine, TrainState
from wemmu.prompts import PromptEncoder
from wemmu.training.losses import FlowMatchingLoss

CONFIG = Optimizer(lr=0.01, dit_lr=0.003, betas=(0.9, 0.95), weight_decay=0.1, clip=0.5)


def make_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "frozen": nn.Linear(3, 3).requires_grad_(False),
            "bridge": nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)),
            "dit": nn.Linear(3, 2),
        }
    )


def loss_of(module: nn.Module, step: int, scale: float = 1.0) -> Tensor:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
    return scale * module["dit"](module["bridge"](x)).square().sum()


def advance(engine: SingleEngine, module: nn.Module, steps: Sequence[int]) -> list[float]:
    norms = []
    for step in steps:
        engine.backward(loss_of(module, step))
        norms.append(engine.step(lr_share=1 / (1 + step)))
    return norms


def clone(state: TrainState) -> TrainState:
    parts = ({n: t.clone() for n, t in d.items()} for d in (state.weights, state.exp_avg, state.exp_avg_sq))
    return TrainState(*parts, state.steps)


def same(a: TrainState, b: TrainState) -> bool:
    pairs = [(a.weights, b.weights), (a.exp_avg, b.exp_avg), (a.exp_avg_sq, b.exp_avg_sq)]
    return a.steps == b.steps and all(
        x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x) for x, y in pairs
    )


def adamw_by_hand(module: nn.Module, steps: Sequence[int]) -> list[float]:
    """The same steps with torch's plain AdamW, its groups and its clipping written out."""
    groups = [
        {"params": [module["bridge"][0].weight], "lr": 0.01, "weight_decay": 0.1},
        {"params": [module["bridge"][0].bias, *module["bridge"][1].parameters()], "lr": 0.01, "weight_decay": 0.0},
        {"params": [module["dit"].weight], "lr": 0.003, "weight_decay": 0.1},
        {"params": [module["dit"].bias], "lr": 0.003, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False, fused=False)
    parameters = [p for group in groups for p in group["params"]]
    peaks, norms = [group["lr"] for group in groups], []
    for step in steps:
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak / (1 + step)
        optimizer.zero_grad()
        loss_of(module, step).backward()
        norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
        for p in parameters:
            p.grad *= min(1.0, 0.5 / float(norm))
        optimizer.step()
        norms.append(float(norm))
    return norms


def test_steps_equal_adamw_by_hand_with_its_groups_clip_and_schedule():
    ours, reference = make_module(), make_module()
    norms = advance(SingleEngine(ours, CONFIG), ours, range(6))
    expected = adamw_by_hand(reference, range(6))
    assert norms == pytest.approx(expected, rel=1e-4)
    assert max(expected) > 0.5, "nothing was clipped, so this proves less"
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, reference.get_parameter(name), atol=1e-6, rtol=1e-5)


def test_the_bridges_vectors_and_no_others_learn_at_their_own_rate():
    """AdamW's first step moves every element by its learning rate."""
    module = make_module()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    config = Optimizer(lr=1e-3, dit_lr=2e-3, vector_scale=10, betas=(0.9, 0.95), clip=1e9)
    advance(SingleEngine(module, config), module, [0])
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in module.named_parameters()}
    expected = {
        "bridge.0.weight": 1e-3,
        "bridge.0.bias": 1e-2,
        "bridge.1.bias": 1e-2,
        "dit.weight": 2e-3,
        "dit.bias": 2e-3,
    }
    assert {name: moved[name] for name in expected} == pytest.approx(expected, rel=1e-2)


def test_clipping_is_by_the_global_norm_which_is_returned_unclipped():
    module = make_module()
    engine = SingleEngine(module, CONFIG)
    engine.backward(loss_of(module, 0))
    parameters = list(engine.trained.values())
    gradients = [p.grad.clone() for p in parameters]
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    seen: list[Tensor] = []
    engine._optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in parameters))
    assert engine.step(1.0) == pytest.approx(float(norm))
    for clipped, gradient in zip(seen, gradients, strict=True):
        torch.testing.assert_close(clipped, gradient * 0.5 / norm)


def test_a_gradient_within_the_norm_is_not_scaled():
    module = make_module()
    engine = SingleEngine(module, CONFIG)
    engine.backward(loss_of(module, 0, scale=1e-4))
    before = module["dit"].weight.grad.clone()
    seen: list[Tensor] = []
    engine._optimizer.register_step_pre_hook(lambda *_: seen.append(module["dit"].weight.grad.clone()))
    assert engine.step(1.0) < 0.5
    assert torch.equal(seen[0], before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float):
    module = make_module()
    engine = SingleEngine(module, CONFIG)
    advance(engine, module, [0])
    before = clone(engine.state())
    engine.backward(loss_of(module, 1))
    module["dit"].weight.grad[0, 0] = bad
    norm = engine.step(1.0)
    assert not norm < float("inf")
    assert same(engine.state(), before)
    assert all(p.grad is None or not p.grad.any() for p in module.parameters()), "the bad gradient is still there"


@pytest.mark.parametrize("done", [0, 2])
def test_a_run_that_is_saved_and_loaded_goes_on_bit_for_bit(done: int):
    module = make_module()
    engine = SingleEngine(module, CONFIG)
    advance(engine, module, range(done))
    saved = clone(engine.state())
    assert saved.steps == done
    advance(engine, module, range(done, done + 3))
    other = make_module()
    for parameter in other.parameters():
        parameter.data.add_(1.0)
    resumed = SingleEngine(other, CONFIG)
    advance(resumed, other, [7])
    resumed.load(saved)
    assert same(resumed.state(), saved)
    advance(resumed, other, range(done, done + 3))
    assert same(resumed.state(), engine.state())


def test_looking_at_the_state_does_not_change_the_run():
    watched, left_alone = make_module(), make_module()
    engines = [SingleEngine(m, CONFIG) for m in (watched, left_alone)]
    engines[0].state()
    for step in range(3):
        advance(engines[0], watched, [step])
        engines[0].state()
    advance(engines[1], left_alone, range(3))
    assert same(engines[0].state(), engines[1].state())


def test_the_state_names_every_trained_parameter_in_its_full_shape_and_no_other():
    module = make_module()
    state = SingleEngine(module, CONFIG).state()
    shapes = {n: p.shape for n, p in module.named_parameters() if p.requires_grad}
    for part in (state.weights, state.exp_avg, state.exp_avg_sq):
        assert {name: t.shape for name, t in part.items()} == shapes
    assert not any(name.startswith("frozen") for name in shapes)


def test_a_parameter_that_a_step_does_not_use_takes_the_step_with_a_gradient_of_zero():
    """A step of one task leaves the parameters of another unused: the VAE branch in text to image."""
    skipping, zeros = make_module(), make_module()
    engines = [SingleEngine(m, CONFIG) for m in (skipping, zeros)]
    for module, engine in zip((skipping, zeros), engines, strict=True):
        advance(engine, module, [0])
        weight = 0.0 if module is zeros else None
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
        loss = module["dit"](x).square().sum()
        engine.backward(loss if weight is None else loss + weight * loss_of(module, 1))
        engine.step(1.0)
        advance(engine, module, [2])
    assert engines[0].state().steps == 3
    assert same(engines[0].state(), engines[1].state())


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        SingleEngine(nn.Linear(2, 2).requires_grad_(False), CONFIG)


@pytest.mark.parametrize("task", [Task.T2I, Task.EDIT])
def test_accumulated_micro_batches_equal_one_large_batch(backbones: Backbones, encoder: PromptEncoder, task: Task):
    model = make_model(backbones)
    model.freeze_all_but(("vae_branch", "pathway", "position_mlp", "dit"))
    loss = FlowMatchingLoss(model, STAGE_RUN)

    def gradients(*parts: list[int]) -> tuple[float, dict[str, Tensor]]:
        model.zero_grad(set_to_none=True)
        total = 0.0
        for ids in parts:
            share = loss(make_batch(encoder, ids, task), 3).values.sum() / 4
            share.backward()
            total += share.item()
        return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    whole, gradient = gradients([0, 1, 2, 3])
    for split in ([[0, 1], [2, 3]], [[3], [0, 2, 1]]):
        summed, other = gradients(*split)
        assert summed == pytest.approx(whole, rel=1e-5)
        assert other.keys() == gradient.keys()
        scale = max(float(g.abs().max()) for g in gradient.values())
        for name in gradient:
            assert torch.allclose(other[name], gradient[name], atol=1e-5 * scale, rtol=1e-3), name
