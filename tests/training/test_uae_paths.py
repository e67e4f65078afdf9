"""UAE's stages that train the generator: Flow-GRPO scores what it drew, a cold start's gradient is the loss's own."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.training.test_uae import ASKED, CONFIG, images_of, weights
from wemmu.config import ConfigError, load_curriculum
from wemmu.noise import Noise
from wemmu.parallel.single import SingleEngine
from wemmu.recipes.recipe import ready_to_train
from wemmu.recipes.uae.recipe import UAERecipe
from wemmu.sampling.solvers import euler
from wemmu.types import Batch

FEW = ("recipe.generator.steps=3", "recipe.max_length=12", "recipe.reward={encoder: pixels}")
FLOW = "stages.reward.objective={kind: flow_grpo, group: 3, temperature: 2.0, %s}"
COLD = "stages.reward.objective={kind: cold_start, temperature: 2.0, %s}"


def make(objective: str, *overrides: str, trains: str = "[dit]") -> UAERecipe:
    chosen = [*FEW, objective, f"stages.reward.trains={trains}", "stages.reward.resolution=32", *overrides]
    made = UAERecipe(load_curriculum(CONFIG, chosen).stage_run("reward"))
    ready_to_train(made, made._run)
    return made


def batches(made: UAERecipe, *counts: int) -> list[Batch]:
    """Micro-batches of so many images, at 32 px."""
    whole, first, found = images_of(sum(counts), 32), 0, []
    for count in counts:
        images = whole[first : first + count]
        ids = torch.arange(first, first + count)
        found.append(Batch("caption", ids, made.policy.encode([ASKED] * count, images), images, None))
        first += count
    return found


@pytest.fixture(scope="module")
def flow() -> UAERecipe:
    """For tests that do not change it."""
    return make(FLOW % "updates: 2, beta: 0.1")


# --------------------------------------------------------------------------------------------------------- Flow-GRPO
def test_a_group_begins_alike_and_no_two_paths_share_their_noise(flow: UAERecipe) -> None:
    (batch,) = flow.prepare(batches(flow, 2), 0).batches
    states = batch.paths.states
    assert states.shape[:2] == (6, 3)
    assert torch.equal(states[0, 0], states[2, 0])
    assert not torch.equal(states[0, 0], states[3, 0])
    steps = flow.loss.transitions(batch.paths)
    with torch.no_grad():
        drawn = torch.stack([(states[:, w + 1] - s.mean) / s.std for w, s in enumerate(steps)], 1).flatten(0, 1)
    # Six paths of two steps each: twelve draws, all of them standard normal and none like another.
    alike = torch.corrcoef(drawn.flatten(1)) - torch.eye(12)
    assert float(alike.abs().max()) < 0.5
    assert float(drawn.std()) == pytest.approx(1, abs=0.1)


def test_paths_depend_on_sample_and_step_and_not_on_the_batch(flow: UAERecipe) -> None:
    together, alone = batches(flow, 2), batches(flow, 1, 1)
    (both,) = flow.prepare(together, 2).batches
    one, other = flow.prepare(alone, 2).batches
    assert torch.allclose(torch.cat([one.paths.states, other.paths.states]), both.paths.states, atol=1e-4)
    (later,) = flow.prepare(together, 4).batches
    assert not torch.allclose(later.paths.states[:, 0], both.paths.states[:, 0])


def test_the_source_of_noise_moves_the_rollout_and_not_the_reconstructions(
    flow: UAERecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume names the source that changes, so nothing else may follow it unsaid."""
    (batch,), found = batches(flow, 2), {}
    for source in ("host", "device"):
        monkeypatch.setattr(flow.loss, "_run", flow._run.changed({"kernels.noise": source}))
        (drawn,) = flow.prepare([batch], 0).batches
        found[source] = drawn.paths.states[:, 0], flow.renderer(["a green cross"] * 2, batch.images, batch.sample_ids)
    (host, reconstructed), (device, same) = found.values()
    assert not torch.allclose(host, device)
    assert torch.equal(reconstructed, same)


@torch.no_grad()
def test_what_was_drawn_has_the_score_it_was_drawn_with(flow: UAERecipe) -> None:
    """The sampler, a few images at a time, against all steps of all paths at once."""
    (batch,) = flow.prepare(batches(flow, 2), 0).batches
    policy, paths = flow.loss, batch.paths
    noise = Noise(flow._run.seed, 0, batch.sample_ids)
    for w, step in enumerate(policy.transitions(paths)):
        members = [noise.normal(f"path/{m}/{w}", tuple(paths.states.shape[2:])) for m in range(3)]
        z = torch.stack(members, 1).flatten(0, 1)
        own = -z.square().flatten(1).mean(1) / 2 - torch.tensor(step.std * (2 * torch.pi) ** 0.5).log()
        assert torch.allclose(paths.logp_old[:, w], own, atol=1e-4)
    again = policy.score(paths, policy.transitions(paths))
    assert torch.equal(again, paths.logp_old), "the ratio of the first update is exactly 1"
    assert torch.equal(torch.stack([s.mean for s in policy.transitions(paths)], 1), paths.means)


def test_captions_of_the_data_set_take_the_place_of_the_policys(flow: UAERecipe, monkeypatch) -> None:
    said = ["a red circle above a blue square", "a green cross"]
    images = images_of(2, 32)
    learner, objective = flow.loss, flow.loss.objective
    labels = flow.policy.captioned(ASKED, images, [flow.encoder.answer_ids(one) for one in said])[1]
    batch = replace(batches(flow, 2)[0], labels=labels)
    noise = Noise(0, 0, batch.sample_ids)
    monkeypatch.setattr(learner, "objective", objective.changed({"captions": "data"}))
    assert learner._captions(batch, noise).texts == said
    with pytest.raises(ValueError, match="valid: policy"):
        learner._captions(batches(flow, 2)[0], noise)


def test_the_dit_alone_learns_and_later_updates_have_other_ratios() -> None:
    made = make(FLOW % "updates: 2, beta: 0.1", "stages.reward.optimizer.lr=0.001")
    before, (batch,) = weights(made), batches(made, 2)
    engine = SingleEngine(made.model, made.loss, made._run.changed({"stage.global_batch": 2}))
    seen = []
    for step in range(2):
        (losses,) = engine.accumulate(made.prepare([batch], step).batches, step)
        engine.step(1.0)
        seen.append(losses.parts)
    assert {"reward", "reward_std", "zero_std", "ratio", "clipped_low", "clipped_high", "kl"} < seen[0].keys()
    assert torch.equal(seen[0]["ratio"], torch.ones(2))
    assert not seen[0]["kl"].any()
    assert (seen[1]["ratio"] - 1).abs().max() > 1e-6
    assert (seen[1]["kl"] > 0).all()
    moved = {name for name, weight in weights(made).items() if not torch.equal(weight, before[name])}
    learns = {name for name, p in made.model.named_parameters() if p.requires_grad}
    assert moved <= learns == {name for name in before if name.startswith("generator.dit.")}
    assert len(moved) > 0.8 * len(learns)


def test_a_constant_reward_leaves_every_bit_of_the_dit() -> None:
    made = make(FLOW % "", "recipe.reward.control=constant")
    before = weights(made)
    engine = SingleEngine(made.model, made.loss, made._run.changed({"stage.global_batch": 2}))
    engine.accumulate(made.prepare(batches(made, 2), 0).batches, 0)
    engine.step(1.0)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(made).items())


@pytest.mark.slow
def test_micro_batches_are_the_batch(flow: UAERecipe) -> None:
    gradients = []
    for parts in ((4,), (1, 3)):
        flow.model.zero_grad()
        for batch in flow.prepare(batches(flow, *parts), 6).batches:
            (flow.loss(batch, 6).values.sum() / 4).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in flow.model.parameters() if p.grad is not None]))
    flow.model.zero_grad()
    assert float(gradients[0].norm()) > 0
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 1e-3


# -------------------------------------------------------------------------------------------------------- cold start
def slope(made: UAERecipe, batch: Batch, parameter: Tensor) -> tuple[float, float]:
    """The derivative of the loss along the parameter's own gradient: by autograd, and by moving the parameter."""
    made.model.zero_grad()
    made.loss(batch, 0).values.sum().backward()
    direction = parameter.grad / parameter.grad.norm()
    by_autograd = float((parameter.grad * direction).sum())
    # A longer step meets kinks of the loss, a shorter one the rounding of float32.
    size, values = 1e-3, []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.add_(sign * size * direction)
            values.append(float(made.loss(batch, 0).values.double().sum()))
            parameter.sub_(sign * size * direction)
    return by_autograd, (values[0] - values[1]) / (2 * size)


@pytest.mark.slow
@pytest.mark.parametrize("condition", ["reencode", "in_context"])
def test_the_gradient_of_a_cold_start_is_the_slope_of_its_loss(condition: str) -> None:
    """Through the autoencoder and all steps of the sampler to the DiT, and through the bridge to the VLM's words."""
    made = make(COLD % "last: 3", "recipe.cond_encoder=policy", f"recipe.condition={condition}", trains="[llm, dit]")
    (batch,) = made.prepare(batches(made, 2), 0).batches
    assert batch.paths.states.shape[1] == 1
    for parameter in (
        made.model.generator.dit.transformer_blocks[1].attn2.to_q.weight,
        made.model.language_model.layers[1].mlp.down_proj.weight,
        made.model.language_model.embed_tokens.weight,
    ):
        by_autograd, by_moving = slope(made, batch, parameter)
        assert by_autograd == pytest.approx(by_moving, rel=0.05)
    frozen = [name for name, p in made.model.named_parameters() if p.grad is not None and not p.requires_grad]
    assert not frozen


def test_only_the_last_steps_have_a_gradient() -> None:
    """What was drawn before them is a constant: the gradient is that of a sampler which begins there."""
    made = make(COLD % "last: 1")
    (batch,) = made.prepare(batches(made, 2), 0).batches
    made.loss(batch, 0).values.sum().backward()
    weight = made.model.generator.dit.transformer_blocks[0].attn1.to_v.weight
    found = weight.grad.clone()
    made.model.zero_grad()
    renderer, ts = made.renderer, made.renderer.times
    noise = Noise(made._run.seed, 0, batch.sample_ids)
    velocity = renderer.velocity(batch.paths.full, batch.paths.empty)
    with torch.no_grad():
        before = euler(velocity, renderer.noise(batch.images, noise), ts[:3])
    drawn = renderer.decoded(before + (ts[3] - ts[2]) * velocity(before, ts[2].expand(2)))
    encoder = made.loss.encoder
    cosines = torch.cosine_similarity(encoder.embed(drawn), encoder.embed(batch.images[:, 0] / 255))
    (1 - cosines).sum().backward()
    assert torch.allclose(
        made.model.generator.dit.transformer_blocks[0].attn1.to_v.weight.grad, found, rtol=1e-3, atol=1e-7
    )
    assert float(found.norm()) > 0


@pytest.mark.slow
def test_a_cold_start_follows_its_gradient() -> None:
    made = make(COLD % "last: 1", "stages.reward.optimizer={lr: 0.0003}")
    engine = SingleEngine(made.model, made.loss, made._run.changed({"stage.global_batch": 4}))
    rewards = []
    for _ in range(6):
        # The same images, words and noise, so that nothing else can raise the cosine.
        (losses,) = engine.accumulate(made.prepare(batches(made, 4), 0).batches, 0)
        engine.step(1.0)
        rewards.append(float(losses.parts["reward"].mean()))
    assert rewards[-1] > rewards[0] + 0.02


# ------------------------------------------------------------------------------------------------------------ config
@pytest.mark.parametrize(
    ("objective", "trains", "overrides", "said"),
    [
        (FLOW % "", "[llm]", (), "flow_grpo does not train llm; valid: dit"),
        (FLOW % "window: 4", "[dit]", (), r"more than recipe\.generator\.steps 3"),
        (COLD % "last: 4", "[dit]", (), r"objective\.last 4 is more than"),
        (COLD % "", "[llm, dit]", (), r"set recipe\.cond_encoder=policy"),
        (FLOW % "", "[dit]", ("memory.offload=[generator]",), r"offload=\[\]"),
        (FLOW % "updates: 7", "[dit]", (), r"not a multiple of objective\.updates 7"),
        (FLOW % "", "[dit]", ("parallel={engine: hybrid, ranks: 2}",), "does not run on engine hybrid"),
        ("stages.reward.steps=80", "[dit]", (), "unified_grpo does not train dit; valid: llm"),
    ],
)
def test_what_does_not_fit_is_refused(objective: str, trains: str, overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_curriculum(CONFIG, [*FEW, objective, f"stages.reward.trains={trains}", *overrides])
