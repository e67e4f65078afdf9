"""Under ZeRO-3 a policy samples, is rewarded and learns as on one device, although captions differ in length.

And the generator draws, is rewarded and learns as there.
"""

from typing import NamedTuple

import pytest
import torch

from tests.parallel.cases import difference, portable, whole
from tests.parallel.ranks import on_ranks
from tests.training import test_uae_paths as paths
from tests.training.test_uae import batch_of, make
from wemmu.parallel.engine import Engine
from wemmu.parallel.single import SingleEngine
from wemmu.parallel.topology import Topology
from wemmu.parallel.zero3 import Zero3Engine
from wemmu.recipes.uae.recipe import UAERecipe
from wemmu.types import IGNORE_INDEX

STEPS, IMAGES = 2, 4


class Outcome(NamedTuple):
    """captions: of each step; longest: tokens of the longest one, of each step."""

    captions: list[list[list[int]]]
    losses: list[list[float]]
    norms: list[float]
    weights: dict[str, tuple]

    @property
    def longest(self) -> list[int]:
        return [max(map(len, captions)) for captions in self.captions]


def policy() -> UAERecipe:
    """Every kind of forward pass through sharded weights: the policy reads captions for the generator, too."""
    return make(
        "recipe.cond_encoder=policy", "recipe.max_length=40",
        temperature=1.5, beta=0.05, aggregate="dapo", scale="batch", updates=2,
    )  # fmt: skip


def train(made: UAERecipe, engine: Engine, rank: int, world: int) -> Outcome:
    """Steps of four images, one micro-batch of each rank."""
    found, own = Outcome([], [], [], {}), IMAGES // world
    for step in range(STEPS):
        prepared = made.prepare([batch_of(made, own, IMAGES * step + own * rank)], step)
        (batch,) = prepared.batches
        found.captions.append([row[row != IGNORE_INDEX].tolist() for row in batch.labels])
        (losses,) = engine.accumulate(prepared.batches, step)
        found.losses.append(losses.values.tolist())
        found.norms.append(engine.step(1.0))
    return found._replace(weights=portable(engine.state().weights))


def on_rank(rank: int, world: int) -> Outcome:
    made = policy()
    run = made._run.changed({"stage.global_batch": IMAGES})
    engine = Zero3Engine(made.model, made.loss, run, Topology(rank, world), torch.device("cpu"))
    return train(made, engine, rank, world)


@pytest.mark.slow
def test_two_ranks_are_one() -> None:
    ours, made = on_ranks(2, on_rank), policy()
    engine = SingleEngine(made.model, made.loss, made._run.changed({"stage.global_batch": IMAGES}))
    theirs = train(made, engine, 0, 1)
    # One rank's captions ended earlier: it went on for the other.
    assert ours[0].longest != ours[1].longest
    for step in range(STEPS):
        assert ours[0].captions[step] + ours[1].captions[step] == theirs.captions[step]
        assert ours[0].losses[step] + ours[1].losses[step] == pytest.approx(theirs.losses[step], rel=1e-3, abs=1e-4)
        assert ours[0].norms[step] == ours[1].norms[step] == pytest.approx(theirs.norms[step], rel=1e-3)
    worst, name = difference(whole([one.weights for one in ours]), whole([theirs.weights]), floor=1e-4)
    assert worst < 1e-3, f"{name} differs by {worst:.1e}"


# ------------------------------------------------------------------------------------------------------- the generator
GENERATOR = {
    "flow_grpo": (paths.FLOW % "updates: 2, beta: 0.1, scale: batch", "[dit]"),
    "cold_start": (paths.COLD % "last: 2", "[llm, dit]"),
    # The reference is the sharded DiT itself, without adapters.
    "flow_grpo by adapters": (
        paths.FLOW % "updates: 2, beta: 0.1, scale: batch",
        "[dit]",
        "recipe.lora={dit: {rank: 2}}",
    ),
}


class Drawn(NamedTuple):
    losses: list[list[float]]
    rewards: list[list[float]]
    weights: dict[str, tuple]


def generator(objective: str) -> UAERecipe:
    chosen, trains, *more = GENERATOR[objective]
    return paths.make(
        chosen, "recipe.cond_encoder=policy", f"stages.reward.global_batch={IMAGES}",
        "stages.reward.optimizer.lr=0.0001", *more, trains=trains,
    )  # fmt: skip


def draw(made: UAERecipe, engine: Engine, rank: int, world: int) -> Drawn:
    found, own = Drawn([], [], {}), IMAGES // world
    for step in range(STEPS):
        batch = paths.batches(made, *[own] * world)[rank]
        (losses,) = engine.accumulate(made.prepare([batch], step).batches, step)
        found.losses.append(losses.values.tolist())
        found.rewards.append(losses.parts["reward"].tolist())
        engine.step(1.0)
    return found._replace(weights=portable(engine.state().weights))


def draw_on_rank(rank: int, world: int, objective: str) -> Drawn:
    made = generator(objective)
    engine = Zero3Engine(made.model, made.loss, made._run, Topology(rank, world), torch.device("cpu"))
    sharded = {name for name, p in made.model.named_parameters() if hasattr(p, "ds_id")}
    assert {name.partition(".")[0] for name in sharded} == {"vlm", "generator"}
    assert all(name.startswith(("vlm.", "generator.dit.")) for name in sharded)
    return draw(made, engine, rank, world)


@pytest.mark.slow
@pytest.mark.parametrize("objective", GENERATOR)
def test_two_ranks_draw_as_one(objective: str) -> None:
    ours, made = on_ranks(2, draw_on_rank, objective), generator(objective)
    theirs = draw(made, SingleEngine(made.model, made.loss, made._run.changed({"stage.global_batch": IMAGES})), 0, 1)
    for step in range(STEPS):
        assert ours[0].rewards[step] + ours[1].rewards[step] == pytest.approx(theirs.rewards[step], abs=2e-3)
        assert ours[0].losses[step] + ours[1].losses[step] == pytest.approx(theirs.losses[step], rel=1e-2, abs=1e-3)
    worst, name = difference(whole([one.weights for one in ours]), whole([theirs.weights]), floor=1e-4)
    assert worst < 1e-3, f"{name} differs by {worst:.1e}"
