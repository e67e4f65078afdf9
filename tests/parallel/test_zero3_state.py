"""The engine zero3: what it skips, what it keeps and what it shows of it."""

import gc
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.models.world import make_batch
from tests.parallel.cases import EDIT, T2I, Case, Run, difference, portable, whole
from tests.parallel.ranks import on_ranks
from tests.parallel.toy import FACTORS, Toy, Watched, toy_run
from wemmu.checkpoint.state import TrainState
from wemmu.config.schema import Backbones
from wemmu.parallel.engine import Engine
from wemmu.parallel.single import SingleEngine
from wemmu.parallel.topology import Topology
from wemmu.parallel.zero3 import Zero3Engine
from wemmu.recipes.wemmu.loss import FlowMatchingLoss
from wemmu.recipes.wemmu.model import WeMMU

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


def toy_engine(dtype: torch.dtype = torch.float32, **optimizer: object) -> Zero3Engine:
    # DeepSpeed collects garbage, which is quick when it need not look at all that was imported.
    gc.freeze()
    toy, topology = Toy(dtype), Topology(dist.get_rank(), dist.get_world_size())
    return Zero3Engine(toy, toy.loss, toy_run(**optimizer), topology, CPU)


def advance(engine: Engine, factors: list[float], steps: list[int]) -> list[float]:
    norms = []
    for step in steps:
        engine.accumulate(factors, step)
        norms.append(engine.step(1 / (1 + step)))
    return norms


def parts(state: TrainState) -> list[list[Tensor]]:
    """This rank's, of weights, moments and averages, by name; live."""
    tensors = [*state.weights.values(), *state.exp_avg.values(), *state.exp_avg_sq.values(), *state.ema.values()]
    return [[part for _, part in tensor.parts] for tensor in tensors]


def copied(state: TrainState) -> list[Tensor]:
    return [part.clone() for part in chain(*parts(state))]


def same(state: TrainState, saved: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(chain(*parts(state)), saved, strict=True))


def toy_outcome(rank: int, world: int, forgets: bool) -> dict:
    engine = toy_engine()
    if not forgets:
        engine._zero.grad_partitions_flat_buffer = SimpleNamespace(zero_=lambda: None)
    norms = advance(engine, [FACTORS[rank]], [0, 1, 2])
    state = engine.state()
    assert state.steps == 3
    return {
        "norms": norms,
        "held": portable(engine.local_parameters(name for name, _ in Toy().named_parameters())),
        **{part: portable(getattr(state, part)) for part in ("weights", "exp_avg", "exp_avg_sq", "ema")},
    }


def toy_difference(forgets: bool) -> float:
    """Between three ranks and the single engine, of all that they show: the largest, relative."""
    ranks, toy = on_ranks(3, toy_outcome, forgets), Toy()
    engine = SingleEngine(toy, toy.loss, toy_run().changed({"stage.global_batch": len(FACTORS)}))
    norms, state = advance(engine, FACTORS, [0, 1, 2]), engine.state()
    assert min(norms) > 2 * engine.config.clip, "nothing is clipped, so this proves less"
    assert all(rank["norms"] == ranks[0]["norms"] for rank in ranks)
    theirs = {part: getattr(state, part) for part in ("weights", "exp_avg", "exp_avg_sq", "ema")}
    theirs["held"] = engine.local_parameters(name for name, _ in toy.named_parameters())
    shown = [difference(whole([rank[p] for rank in ranks]), theirs[p], floor=1e-3)[0] for p in theirs]
    return max(*shown, float((torch.tensor(ranks[0]["norms"]) / torch.tensor(norms) - 1).abs().max()))


def test_tensors_that_do_not_divide_and_a_parameter_that_a_step_does_not_use():
    """A parameter without a gradient takes the step with one of zero, as in the single engine."""
    assert toy_difference(forgets=True) < 1e-5
    assert toy_difference(forgets=False) > 1e-3, (
        "DeepSpeed no longer steps with an old gradient, so this proves nothing"
    )


def skips_what_is_not_finite(rank: int, world: int) -> None:
    for dtype, bad in ((torch.float32, NAN), (torch.float32, INF), (torch.bfloat16, NAN)):
        watched, left_alone = toy_engine(dtype), toy_engine(dtype)
        for engine in (watched, left_alone):
            advance(engine, [FACTORS[rank], 1.0], [0])
        before = copied(watched.state())
        (norm,) = advance(watched, [FACTORS[rank], bad if rank == 1 else 1.0], [1])
        assert not norm < INF
        assert watched.state().steps == 1
        assert same(watched.state(), before)
        assert not any(part.any() for placed in watched.gradients().values() for _, part in placed.parts)
        for engine in (watched, left_alone):
            advance(engine, [FACTORS[rank]], [2])
        assert same(watched.state(), copied(left_alone.state()))
        assert not same(watched.state(), before)


def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any():
    on_ranks(3, skips_what_is_not_finite)


def gradients(rank: int, world: int) -> dict:
    engine = toy_engine(torch.bfloat16)
    engine.accumulate([FACTORS[rank]], 0)
    return portable(engine.gradients())


def test_bf16_gradients_are_summed_in_float32():
    toy = Toy(torch.bfloat16)
    engine = SingleEngine(toy, toy.loss, toy_run().changed({"stage.global_batch": len(FACTORS)}))
    # Two, for a loss that is scaled by two is rounded alike.
    engine.accumulate(FACTORS[:2], 0)
    theirs = engine.gradients()
    assert any(not torch.equal(g, g.bfloat16().float()) for g in theirs.values())
    assert difference(whole(on_ranks(2, gradients)), theirs, floor=1e-4)[0] < 1e-6


def small_steps_add_up(rank: int, world: int) -> None:
    engine = toy_engine(torch.bfloat16, lr=1e-5, module_lr={"dit": 1e-5}, vector_scale=1.0)
    before = copied(engine.state())
    advance(engine, [FACTORS[rank]], [0] * 5)
    for old, new in zip(before, chain(*parts(engine.state())), strict=True):
        assert old.dtype == torch.float32
        assert not torch.equal(old, new)


def test_bf16_weights_follow_float32_masters():
    """Steps smaller than bfloat16 can say are not lost."""
    on_ranks(2, small_steps_add_up)


def uses_what_is_put_into_frozen_weights(rank: int, world: int) -> None:
    engine, toy = toy_engine(), Toy()
    (before,) = engine.accumulate([1.0], 0)
    engine.step(0.0)
    torch.nn.init.ones_(toy.dit["frozen"].weight)
    for placed in engine.local_parameters(["dit.frozen.weight"]).values():
        for _, part in placed.parts:
            part.fill_(1.0)
    engine.on_restore(0)
    (after,) = engine.accumulate([1.0], 0)
    torch.testing.assert_close(after.values, toy.loss(1.0, 0).values.detach())
    assert not torch.equal(after.values, before.values)


def test_frozen_weights_can_be_put_in_place_too():
    """As a stage does that starts from a DiT which an earlier one trained."""
    on_ranks(2, uses_what_is_put_into_frozen_weights)


class Training(Run):
    """Of the model on one rank, with text to image and editing by turns."""

    def __init__(self, backbones: Backbones, dtype: str = "float32"):
        gc.freeze()
        rank, world = dist.get_rank(), dist.get_world_size()
        case = Case(dtype=dtype, ema=0.99, tasks=(EDIT, T2I))
        topology = Topology(rank, world)
        super().__init__(case, backbones, lambda *of_case: Watched(*of_case, topology, CPU), rank, world)

    @torch.no_grad()
    def velocity(self, model: WeMMU | None = None) -> Tensor:
        """What `model`, by default the one in training, answers to three prompts; all ranks ask the same."""
        loss, batch = FlowMatchingLoss(model or self.model, self.case.run), make_batch(self.encoder, [1, 2, 3])
        flow = loss.draw(batch, 0)
        return loss.model.velocity(flow.x_t, flow.t, loss.condition(batch, 0))


def goes_on(rank: int, world: int, backbones: Backbones, dtype: str) -> None:
    straight, elsewhere = Training(backbones, dtype), Training(backbones, dtype)
    elsewhere.steps(7, 1)
    for done in (0, 2):
        straight.steps(steps := straight.engine.state().steps, done - steps)
        saved, drawn = copied(straight.engine.state()), straight.velocity()
        losses = straight.steps(done, 2)
        after = copied(straight.engine.state())
        # Into a fresh engine, into one that went elsewhere, and back into the one it was of.
        for run in (Training(backbones, dtype), elsewhere, straight):
            for part, theirs in zip(chain(*parts(run.engine.state())), saved, strict=True):
                part.copy_(theirs)
            run.engine.on_restore(done)
            assert torch.equal(run.velocity(), drawn)
            assert run.engine.state().steps == done
            assert same(run.engine.state(), saved)
            assert run.steps(done, 2) == losses
            assert same(run.engine.state(), after)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_goes_on_bit_for_bit_from_what_was_put_into_its_state(backbones: Backbones, dtype: str):
    on_ranks(2, goes_on, backbones, dtype)


def rotary_stays_exact(rank: int, world: int, backbones: Backbones) -> None:
    run = Training(backbones, "bfloat16")
    frequencies = run.model.bridge.pathway.rotary.inv_freq
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, run.model.vlm.language_model.rotary_emb.inv_freq)
    assert {p.dtype for p in run.model.parameters()} == {torch.bfloat16}


def test_bf16_is_of_the_weights_and_not_of_the_rotary_frequencies(backbones: Backbones):
    on_ranks(2, rotary_stays_exact, backbones)


def gathered(run: Training, backbones: Backbones) -> WeMMU:
    """A whole model with the weights of the one in training."""
    import deepspeed

    model = run.case.model(backbones)
    for name, parameter in model.named_parameters():
        theirs = run.model.get_parameter(name)
        with deepspeed.zero.GatheredParameters([theirs]):
            parameter.data.copy_(theirs.data)
    return model


def draws(rank: int, world: int, backbones: Backbones) -> None:
    drawing, left_alone, drawn = Training(backbones), Training(backbones), []
    for step in range(4):
        drawn.append(drawing.velocity())
        assert torch.equal(drawn[-1], drawing.velocity(gathered(drawing, backbones)))
        assert drawing.steps(step, 1) == left_alone.steps(step, 1)
    assert not torch.equal(drawn[0], drawn[-1])
    assert same(drawing.engine.state(), copied(left_alone.engine.state()))


def test_images_drawn_between_steps_are_the_models_and_disturb_nothing(backbones: Backbones):
    on_ranks(2, draws, backbones)
