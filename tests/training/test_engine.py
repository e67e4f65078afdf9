"""The single-device engine is AdamW with one global clip; every other engine is measured against it."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tests.models.world import make_model, micro_batches
from tests.training.layouts import PARTS, differences
from tests.training.runs import STAGE_RUN
from wemmu.checkpoint.state import TrainState
from wemmu.config.schema import Backbones
from wemmu.config.stage import Optimizer
from wemmu.config.task import Task
from wemmu.parallel.single import SingleEngine
from wemmu.prompts import PromptEncoder
from wemmu.recipes.wemmu.loss import FlowMatchingLoss
from wemmu.types import Losses

CONFIG = Optimizer(lr=0.01, module_lr={"dit": 0.003}, betas=(0.9, 0.95), weight_decay=0.1, clip=0.5, ema_decay=0.5)
RUN = STAGE_RUN.changed({"stage.global_batch": 1})


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
    x = x.to(module["dit"].weight.dtype)
    return scale * module["dit"](module["bridge"](x)).square().sum()


def engine_of(module: nn.Module, config: Optimizer = CONFIG, loss=loss_of) -> SingleEngine:
    """An engine whose samples are one number each: the factor of the loss."""
    return SingleEngine(
        module,
        lambda scale, step: Losses(loss(module, step, scale)[None], {}),
        RUN.changed({"stage.optimizer": config}),
    )


def advance(engine: SingleEngine, steps: Sequence[int]) -> list[float]:
    norms = []
    for step in steps:
        engine.accumulate([1.0], step)
        norms.append(engine.step(lr_share=1 / (1 + step)))
    return norms


def clipped_gradients(engine: SingleEngine) -> dict[str, Tensor]:
    """What a step hands to AdamW."""
    seen: dict[str, Tensor] = {}
    real = engine._adamw.step

    def step(lr_share: float, norm: Tensor) -> None:
        seen.update({name: g.clone() for name, g in engine.gradients().items()})
        real(lr_share, norm)

    engine._adamw.step = step
    engine.step(1.0)
    return seen


def clone(state: TrainState) -> TrainState:
    parts = {part: {n: t.clone() for n, t in getattr(state, part).items()} for part in PARTS}
    return TrainState(**parts, steps=state.steps)


def put(engine: SingleEngine, saved: TrainState) -> None:
    """As a checkpoint does it: fill the live tensors, then say so."""
    live = engine.state()
    for part in PARTS:
        for name, tensor in getattr(live, part).items():
            tensor.copy_(getattr(saved, part)[name])
    engine.on_restore(saved.steps)


def same(a: TrainState, b: TrainState) -> bool:
    return a.steps == b.steps and not differences(a, b)


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
    norms = advance(engine_of(ours), range(6))
    expected = adamw_by_hand(reference, range(6))
    assert norms == pytest.approx(expected, rel=1e-4)
    assert max(expected) > 0.5, "nothing was clipped, so this proves less"
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, reference.get_parameter(name), atol=1e-6, rtol=1e-5)


def test_the_bridges_vectors_and_no_others_learn_at_their_own_rate():
    """AdamW's first step moves every element by its learning rate."""
    module = make_module()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    config = Optimizer(lr=1e-3, module_lr={"dit": 2e-3}, vector_scale=10, betas=(0.9, 0.95), clip=1e9)
    advance(engine_of(module, config), [0])
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
    engine = engine_of(make_module())
    engine.accumulate([1.0], 0)
    gradients = {name: g.clone() for name, g in engine.gradients().items()}
    norm = float(torch.cat([g.flatten() for g in gradients.values()]).norm())
    again = engine_of(make_module())
    again.accumulate([1.0], 0)
    assert again.step(1.0) == pytest.approx(norm)
    for name, clipped in clipped_gradients(engine).items():
        torch.testing.assert_close(clipped, gradients[name] * 0.5 / norm)
    # Within the norm, nothing is scaled.
    engine.accumulate([1e-4], 0)
    before = {name: g.clone() for name, g in engine.gradients().items()}
    seen = clipped_gradients(engine)
    assert all(torch.equal(seen[name], before[name]) for name in before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float):
    engine = engine_of(make_module())
    advance(engine, [0])
    before = clone(engine.state())
    engine.accumulate([1.0, bad], 1)
    norm = engine.step(1.0)
    assert not norm < float("inf")
    assert same(engine.state(), before)
    assert not any(g.any() for g in engine.gradients().values()), "the bad gradient is still there"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("done", [0, 2])
def test_a_run_that_is_saved_and_loaded_goes_on_bit_for_bit(done: int, dtype: torch.dtype):
    engine = engine_of(make_module().to(dtype))
    advance(engine, range(done))
    saved = clone(engine.state())
    assert saved.steps == done
    advance(engine, range(done, done + 3))
    other = make_module().to(dtype)
    for parameter in other.parameters():
        parameter.data.add_(1.0)
    resumed = engine_of(other)
    advance(resumed, [7])
    put(resumed, saved)
    assert same(resumed.state(), saved)
    advance(resumed, range(done, done + 3))
    assert same(resumed.state(), engine.state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_follows_the_weights_and_a_young_one_faster(dtype: torch.dtype):
    """ema = d ema + (1 - d) w with d = min(decay, (1 + n) / (10 + n)) after step n, of the float32 weights."""
    engine = engine_of(make_module().to(dtype), CONFIG.model_copy(update={"ema_decay": 0.25}))
    average = clone(engine.state()).weights
    for n, decay in enumerate((2 / 11, 3 / 12, 0.25, 0.25), start=1):
        advance(engine, [n])
        state = engine.state()
        for name, weight in state.weights.items():
            average[name] = decay * average[name] + (1 - decay) * weight
            assert state.ema[name].dtype == torch.float32
            torch.testing.assert_close(state.ema[name], average[name])
            assert not torch.equal(state.ema[name], weight), name


def test_without_a_decay_no_average_is_kept():
    engine = engine_of(make_module(), CONFIG.model_copy(update={"ema_decay": None}))
    advance(engine, range(2))
    assert engine.state().ema == {}
    assert all("ema" not in state for state in engine._adamw._optimizer.state.values())


def test_the_state_names_all_that_is_trained_in_full_shape_and_looking_at_it_does_not_change_the_run():
    module = make_module()
    engines = [engine_of(module), engine_of(make_module())]
    shapes = {n: p.shape for n, p in module.named_parameters() if not n.startswith("frozen")}
    for step in range(3):
        state = engines[0].state()
        for part in PARTS:
            assert {name: t.shape for name, t in getattr(state, part).items()} == shapes
        advance(engines[0], [step])
    advance(engines[1], range(3))
    assert same(engines[0].state(), engines[1].state())


def test_a_parameter_that_a_step_does_not_use_takes_the_step_with_a_gradient_of_zero():
    """A step of one task leaves the parameters of another unused: the VAE branch in text to image."""

    def skipping(module: nn.Module, step: int, scale: float) -> Tensor:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
        return module["dit"](x).square().sum() if step == 1 else loss_of(module, step, scale)

    def with_zeros(module: nn.Module, step: int, scale: float) -> Tensor:
        return skipping(module, step, scale) + 0.0 * loss_of(module, step)

    engines = [engine_of(make_module(), loss=loss) for loss in (skipping, with_zeros)]
    for engine in engines:
        advance(engine, range(3))
    assert engines[0].state().steps == 3
    assert same(engines[0].state(), engines[1].state())


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        engine_of(nn.Linear(2, 2).requires_grad_(False))


def test_bf16_weights_follow_float32_masters():
    """Steps smaller than bfloat16 can say are not lost."""
    module = make_module().bfloat16()
    engine = engine_of(module, Optimizer(lr=1e-5, module_lr={"dit": 1e-5}, clip=1e9))
    before = {name: w.clone() for name, w in engine.state().weights.items()}
    advance(engine, [0] * 20)
    for name, master in engine.state().weights.items():
        assert master.dtype == torch.float32
        assert torch.equal(module.get_parameter(name), master.bfloat16())
        assert (master != before[name]).any(), name


@pytest.mark.parametrize("kind", ["flow", "contrastive"])
@pytest.mark.parametrize("task", [Task.T2I, Task.EDIT])
def test_accumulated_micro_batches_equal_one_large_batch(
    backbones: Backbones, encoder: PromptEncoder, task: Task, kind: str
):
    model = make_model(backbones)
    model.freeze_all_but(("vae_branch", "pathway", "position_mlp", "dit"))
    run = STAGE_RUN.changed({"stage.objective.kind": kind, "stage.optimizer": CONFIG, "stage.global_batch": 4})

    def gradients(accumulation: int) -> tuple[float, dict[str, Tensor]]:
        engine = SingleEngine(model, FlowMatchingLoss(model, run), run)
        losses = engine.accumulate(micro_batches(encoder, [5, 2, 3, 9], task, 0, 1, accumulation), 3)
        return sum(float(one.values.sum()) for one in losses), engine.gradients()

    whole, gradient = gradients(1)
    for accumulation in (2, 4):
        summed, other = gradients(accumulation)
        assert summed == pytest.approx(whole, rel=1e-5)
        scale = max(float(g.abs().max()) for g in gradient.values())
        for name in gradient:
            assert torch.allclose(other[name], gradient[name], atol=1e-5 * scale, rtol=1e-3), name
