"""UAE: the policy samples what it scores, the reward is of the words alone, and nothing but the policy learns."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from wemmu.backbones.encoders import cosine
from wemmu.config import StageRun, load_curriculum
from wemmu.noise import Noise
from wemmu.parallel.single import SingleEngine
from wemmu.recipes.recipe import ready_to_train
from wemmu.recipes.uae.config import UnifiedGRPO
from wemmu.recipes.uae.policy import Policy, invert_cdf
from wemmu.recipes.uae.recipe import UAERecipe
from wemmu.recipes.uae.reward import Pixels
from wemmu.shapes.render import render
from wemmu.shapes.scene import random_scene
from wemmu.types import IGNORE_INDEX, Batch

CONFIG = Path(__file__).parents[2] / "configs" / "shapes" / "uae.yaml"
# Of half the temperature that would be the reference's own, and of captions that are cut in part.
GRPO = {"kind": "unified_grpo", "group": 3, "temperature": 2.0}
FEW = ("recipe.generator.steps=1", "recipe.max_length=16", "recipe.reward={encoder: pixels}")
ASKED = "describe the image"


def make(*overrides: str, **objective: object) -> UAERecipe:
    """The shipped VLM, whose captions are sentences, in the stage with rewards."""
    run = load_curriculum(CONFIG, [*FEW, *overrides]).stage_run("reward")
    made = UAERecipe(run.changed({"stage.objective": UnifiedGRPO.model_validate(GRPO | objective)}))
    ready_to_train(made, made._run)
    return made


@pytest.fixture(scope="module")
def made() -> UAERecipe:
    """For tests that do not change it."""
    return make()


def images_of(count: int = 3, side: int = 64) -> Tensor:
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(count)]
    return torch.stack([torch.from_numpy(np.array(render(scene, side))).permute(2, 0, 1) for scene in scenes])[:, None]


def batch_of(made: UAERecipe, count: int = 3, first: int = 0) -> Batch:
    images = images_of(first + count)[first:]
    return Batch(
        "caption", torch.arange(first, first + count), made.policy.encode([ASKED] * count, images), images, None
    )


def sampled(policy: Policy, images: Tensor, ids: list[int], step: int = 0, group: int = 3, temperature: float = 2.0):
    policy.model.eval()
    return policy.sample(ASKED, images, Noise(0, step, torch.tensor(ids)), group, temperature)


# ------------------------------------------------------------------------------------------------------------ policy
@torch.no_grad()
def test_a_token_is_drawn_as_often_as_it_is_likely_and_a_banned_one_never(made: UAERecipe) -> None:
    logits = torch.randn(made.policy.banned.numel(), generator=torch.Generator().manual_seed(0))
    logits[made.policy.banned] = 50.0
    logp = made.policy.log_distribution(logits, 0.7)
    uniforms = torch.cat(
        [torch.rand(10_000, generator=torch.Generator().manual_seed(1)), torch.tensor([0.0, 1 - 2**-24])]
    )
    drawn = invert_cdf(logp.expand(len(uniforms), -1), uniforms)
    assert not made.policy.banned[drawn].any()
    shares = drawn.bincount(minlength=len(logp)) / len(drawn)
    assert (shares - logp.exp()).abs().max() < 0.02
    by_hand = torch.where(made.policy.banned, -torch.inf, logits / 0.7)
    assert torch.allclose(logp, by_hand - by_hand.logsumexp(0))


def test_no_caption_may_claim_an_image_or_end_a_turn_but_by_its_end(made: UAERecipe) -> None:
    tokenizer, banned = made.encoder.tokenizer, made.policy.banned
    ids = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>"])
    assert banned[ids].all()
    assert banned[tokenizer.pad_token_id]
    assert not banned[tokenizer.eos_token_id]
    assert not banned[tokenizer.convert_tokens_to_ids("red")]


def test_captions_depend_on_sample_member_and_step_and_on_nothing_else(made: UAERecipe) -> None:
    images = images_of(3)
    together = sampled(made.policy, images, [0, 1, 2])
    assert len({tuple(tokens) for tokens in together.tokens}) > 5
    assert sampled(made.policy, images, [0, 1, 2]) == together
    for row in range(3):
        alone = sampled(made.policy, images[row : row + 1], [row])
        assert alone.tokens == together.tokens[3 * row : 3 * row + 3]
    assert sampled(made.policy, images[:1], [0], group=2).tokens == together.tokens[:2]
    assert sampled(made.policy, images, [0, 1, 2], step=1) != together
    assert sampled(made.policy, images[:1], [7]).tokens != together.tokens[:3]


def test_a_caption_ends_once_and_says_whether_it_was_cut(made: UAERecipe) -> None:
    captions, end = sampled(made.policy, images_of(4), [0, 1, 2, 3]), made.policy.end
    assert set(captions.truncated) == {True, False}
    for tokens, text, cut in zip(captions.tokens, captions.texts, captions.truncated, strict=True):
        assert tokens.count(end) == (0 if cut else 1)
        assert cut == (tokens[-1] != end)
        assert not cut or len(tokens) == made.policy.max_length
        assert text == made.encoder.tokenizer.decode([t for t in tokens if t != end]).strip()
    _, labels = made.policy.captioned(ASKED, images_of(4), captions.tokens)
    assert (labels != IGNORE_INDEX).sum(1).tolist() == [len(tokens) for tokens in captions.tokens]


@torch.no_grad()
def test_a_score_is_that_of_the_token_at_its_turn(made: UAERecipe) -> None:
    """Teacher forcing is prefix by prefix, at the temperature of sampling, whatever comes later or beside it."""
    policy, images = made.policy, images_of(2)
    captions = sampled(policy, images, [0, 1])
    prompts, labels = policy.captioned(ASKED, images, captions.tokens)
    logp, entropy = policy.score(prompts, images, labels, 2.0)
    assert not logp[labels == IGNORE_INDEX].any()
    begin = int((labels[0] != IGNORE_INDEX).nonzero()[0])
    for row, caption in ((0, captions.tokens[0]), (4, captions.tokens[4])):
        for t, token in enumerate(caption):
            # Other words from here on, and no padding.
            changed = [*caption[:t], token, *([5] * (t % 3))]
            own, wanted = policy.captioned(ASKED, images[row // 3 :][:1], [changed])
            alone, its = policy.score(own, images[row // 3 :][:1], wanted, 2.0)
            assert torch.allclose(alone[0, begin + t], logp[row, begin + t], atol=1e-5)
            assert torch.allclose(its[0, begin + t], entropy[row, begin + t], atol=1e-4)


@torch.no_grad()
def test_what_is_sampled_has_the_log_probability_it_was_sampled_with(made: UAERecipe) -> None:
    """The cache of keys and values against the whole forward pass."""
    policy, images, seen = made.policy, images_of(2), []
    policy.model.eval()
    noise = torch.rand(6, policy.max_length, generator=torch.Generator().manual_seed(3))

    def choose(logp: Tensor, t: int) -> Tensor:
        token = invert_cdf(logp, noise[:, t])
        seen.append(logp.gather(1, token[:, None])[:, 0])
        return token

    captions = policy._generate([ASKED] * 2, images, 3, 2.0, choose)
    prompts, labels = policy.captioned(ASKED, images, captions.tokens)
    logp = policy.score(prompts, images, labels, 2.0)[0]
    begin = int((labels[0] != IGNORE_INDEX).nonzero()[0])
    for row, tokens in enumerate(captions.tokens):
        rolled = torch.stack(seen)[: len(tokens), row]
        assert torch.allclose(logp[row, begin : begin + len(tokens)], rolled, atol=1e-4)


@torch.no_grad()
def test_the_likeliest_caption_is_the_libraries_own(made: UAERecipe) -> None:
    images = images_of(2)
    made.model.eval()
    captions = made.policy.most_likely([ASKED] * 2, images)
    assert captions.texts[0] != captions.texts[1]
    for row in range(2):
        tokens = captions.tokens[row]
        prompts, labels = made.policy.captioned(ASKED, images[row : row + 1], [tokens])
        states = made.model.states(prompts, images[row : row + 1])[0]
        best = made.model.logits(states).argmax(-1)
        places = labels[0] != IGNORE_INDEX
        assert torch.equal(best[places], labels[0][places])


# ------------------------------------------------------------------------------------------------------------ reward
def test_an_encoder_sees_images_as_they_are_or_refuses() -> None:
    images = images_of(3)[:, 0]
    features = Pixels().embed(images / 255)
    assert torch.allclose(cosine(features, Pixels().embed(images / 255)), torch.ones(3))
    assert cosine(features, features.roll(1, 0)).max() < 0.99
    for wrong in (images, images.float(), images / 127.5 - 1):
        with pytest.raises(ValueError, match="valid: 0 to 1"):
            Pixels().embed(wrong)


WORDS = [
    "a red circle at the top left",
    "a blue square at the bottom right on a white background",
    "a red circle at the top left",
]


def test_a_reconstruction_is_a_function_of_caption_sample_and_seed(made: UAERecipe) -> None:
    images, ids = images_of(1).repeat(3, 1, 1, 1, 1), torch.tensor([5, 5, 6])
    drawn = made.renderer(WORDS, images, ids)
    assert torch.equal(made.renderer(WORDS, images, ids), drawn)
    assert 0 <= float(drawn.min()) < float(drawn.max()) <= 1
    for row in range(3):
        alone = made.renderer(WORDS[row : row + 1], images[:1], ids[row : row + 1])
        assert torch.allclose(alone[0], drawn[row], atol=1e-4)
    # The same words with the noise of another sample.
    assert (drawn[0] - drawn[2]).abs().max() > 0.01
    other = made.renderer(WORDS[:1], images[:1], torch.tensor([6]))
    assert torch.allclose(other[0], drawn[2], atol=1e-4)


def test_rewards_follow_the_captions_and_equal_captions_have_equal_rewards(made: UAERecipe, monkeypatch) -> None:
    images, ids = images_of(2), torch.tensor([0, 1])
    words = [WORDS[0], WORDS[1], WORDS[0], WORDS[1], WORDS[0], WORDS[0]]
    reward = made.loss.reward
    rewards, _ = reward(words, images, ids)
    assert rewards.shape == (2, 3)
    assert rewards[0, 0] == rewards[0, 2] != rewards[0, 1]
    assert rewards[1, 1] == rewards[1, 2]
    swapped, _ = reward([words[1], words[0], *words[2:]], images, ids)
    assert torch.allclose(swapped[0, :2], rewards[0, :2].flip(0), atol=1e-5)
    monkeypatch.setattr(made.model.generator, "offloaded", True)
    assert torch.equal(reward(words, images, ids)[0], rewards)


def test_the_words_are_the_bottleneck_unless_the_condition_is_in_context(made: UAERecipe, monkeypatch) -> None:
    """The leak test: the same caption under another image."""
    images, ids = images_of(2), torch.tensor([0, 0])
    once, again = (made.renderer(WORDS[:1], images[i : i + 1], ids[:1]) for i in range(2))
    assert torch.equal(once, again)
    monkeypatch.setattr(made.renderer, "config", made.renderer.config.changed({"condition": "in_context"}))
    once, again = (made.renderer(WORDS[:1], images[i : i + 1], ids[:1]) for i in range(2))
    assert (once - again).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("reader", ["reference", "policy"])
def test_the_policy_moves_the_condition_only_where_the_config_says_so(
    made: UAERecipe, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    images, ids = images_of(1), torch.tensor([0])
    weight = made.model.language_model.layers[0].mlp.down_proj.weight
    made.model.eval()
    monkeypatch.setattr(made.renderer, "config", made.renderer.config.changed({"cond_encoder": reader}))
    before = made.renderer(WORDS[:1], images, ids)
    weight.mul_(1.5)
    moved = made.renderer(WORDS[:1], images, ids)
    weight.div_(1.5)
    assert torch.equal(before, moved) == (reader == "reference")


def test_controls_reward_everything_alike_or_another_image(made: UAERecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    reward, config = made.loss.reward, made.loss.reward.config
    images, ids, words = images_of(2), torch.tensor([0, 1]), [WORDS[0], WORDS[1]] * 2
    rewards, _ = reward(words, images, ids)

    def controlled(control: str) -> tuple[Tensor, dict[str, Tensor]]:
        monkeypatch.setattr(reward, "config", config.changed({"reward.control": control}))
        return reward(words, images, ids)

    constant, also = controlled("constant")
    assert torch.equal(constant, torch.ones(2, 2))
    assert torch.equal(also["own"], rewards)
    deranged, also = controlled("deranged")
    assert torch.equal(also["own"], rewards)
    assert not torch.equal(deranged, rewards)
    with pytest.raises(ValueError, match=r"memory\.micro_batch to 2"):
        reward(words[:2], images[:1], ids[:1])


# ---------------------------------------------------------------------------------------------------------- training
def steps(made: UAERecipe, count: int, first: int = 0) -> list[dict[str, Tensor]]:
    """Train `count` steps of 2 micro-batches with 2 images each; returns the losses' parts."""
    run: StageRun = made._run
    engine = SingleEngine(made.model, made.loss, run.changed({"stage.global_batch": 4}))
    recorded = []
    for step in range(first, first + count):
        prepared = made.prepare([batch_of(made, 2, 4 * step), batch_of(made, 2, 4 * step + 2)], step)
        losses = engine.accumulate(prepared.batches, step)
        assert float(engine.step(1.0)) >= 0
        recorded += [{"loss": one.values, **one.parts} for one in losses]
    return recorded


def weights(made: UAERecipe) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in made.model.named_parameters()}


@pytest.mark.slow
def test_only_the_language_model_learns() -> None:
    made = make(beta=0.01)
    before = weights(made)
    recorded = steps(made, 2)
    learns = {name for name, p in made.model.named_parameters() if p.requires_grad}
    assert learns == {name for name in before if name.startswith(("vlm.model.language_model.", "vlm.lm_head."))}
    after = weights(made)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved <= learns
    assert len(moved) > 0.9 * len(learns)
    assert all(p.grad is None for name, p in made.model.named_parameters() if name not in learns)
    assert {"reward", "entropy", "kl", "clipped_low", "clipped_high", "length", "truncated", "zero_std"} < recorded[
        0
    ].keys()
    # Before the first update the policy is the reference.
    assert float(recorded[0]["kl"].abs().max()) == 0
    assert float(recorded[-1]["kl"].abs().max()) > 0


def test_without_a_penalty_no_reference_is_kept(made: UAERecipe) -> None:
    assert made.model.reference is None


@pytest.mark.parametrize("aggregate", ["grpo", "dapo"])
def test_a_constant_reward_leaves_every_bit_of_the_weights(aggregate: str) -> None:
    made = make("recipe.reward.control=constant", aggregate=aggregate)
    before = weights(made)
    steps(made, 1)
    assert all(torch.equal(before[name], weight) for name, weight in weights(made).items())


@pytest.mark.slow
def test_micro_batches_are_the_batch(made: UAERecipe) -> None:
    """With dapo, whose normaliser is of the whole step."""
    made = make(aggregate="dapo", scale="batch")
    gradients = []
    for parts in ([batch_of(made, 4)], [batch_of(made, 1, i) for i in range(4)]):
        prepared = made.prepare(parts, 0)
        made.model.zero_grad()
        for batch in prepared.batches:
            (made.loss(batch, 0).values.sum() / 4).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in made.model.parameters() if p.grad is not None]))
    assert float(gradients[0].norm()) > 0
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 1e-4


@pytest.mark.slow
def test_the_first_update_of_a_rollout_has_a_ratio_of_one_and_later_ones_have_not() -> None:
    made = make(updates=2)
    assert made.period == 2
    run = made._run
    engine = SingleEngine(made.model, made.loss, run.changed({"stage.global_batch": 2}))
    seen = []
    for step in range(2):
        prepared = made.prepare([batch_of(made, 2, 10 * step)], step)
        (batch,) = prepared.batches
        with torch.no_grad():
            logp, _ = made.policy.score(batch.prompts, batch.images, batch.labels, GRPO["temperature"])
        seen.append((batch, (logp - batch.rollout.logp_old).abs().max()))
        engine.accumulate(prepared.batches, step)
        engine.step(1.0)
    assert seen[0][0] is seen[1][0]
    assert float(seen[0][1]) == 0
    assert float(seen[1][1]) > 0
    assert replace(seen[0][0], rollout=None).images is seen[0][0].images
