"""The sampler: guided velocities of the whole model, seeded, one sample apart from the next."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.models.world import INPUTS, WORDS, encode, make_model, random_images
from wemmu.config.schema import Backbones, Sampling
from wemmu.config.task import GENERATION_TASKS, Task
from wemmu.noise import Noise
from wemmu.prompts import PromptEncoder
from wemmu.recipes.wemmu.model import WeMMU
from wemmu.sampling.request import GenerationRequest, task_of
from wemmu.sampling.sampler import Sampler
from wemmu.sampling.solvers import euler, times

SHIFT = 3.0
SAMPLING = Sampling(steps=3, t2i=2.5, image=1.5, instruction=3.0, multi=2.0, seed=4)


@pytest.fixture
def sampler(model: WeMMU, encoder: PromptEncoder) -> Sampler:
    return Sampler(model, encoder, SHIFT)


def make_request(task: Task, ids: Sequence[int] = (0, 1), size: tuple[int, int] = (32, 32)) -> GenerationRequest:
    images = torch.stack([random_images(i, INPUTS[task], 3, 32, 32) for i in ids])
    wordless = task in (Task.UNCONDITIONAL, Task.RECONSTRUCTION)
    texts = ["" if wordless else WORDS[i] for i in ids]
    return GenerationRequest(task, texts, images, size, torch.tensor(ids))


@torch.no_grad()
def by_hand(
    model: WeMMU, encoder: PromptEncoder, request: GenerationRequest, rule, *branches: tuple[Sequence[str], Tensor]
):
    """Solve with `rule(v of each branch)`, a branch being its (texts, images)."""
    noise = Noise(SAMPLING.seed, 0, request.sample_ids)
    conditions = [model.condition(encode(encoder, t, i), i, request.size, noise) for t, i in branches]
    x_1 = noise.normal("latent", (model.vae.latent_channels, 2, 2))
    field = lambda x, t: rule(*[model.velocity(x, t, c) for c in conditions])  # noqa: E731
    return model.vae.decode(euler(field, x_1, times(SAMPLING.steps, SHIFT)))


@pytest.mark.parametrize("task", GENERATION_TASKS)
def test_guidance_one_is_the_plain_conditional_solver(
    model: WeMMU, encoder: PromptEncoder, sampler: Sampler, task: Task
):
    request = make_request(task)
    plain = SAMPLING.model_copy(update={"t2i": 1.0, "image": 1.0, "instruction": 1.0, "multi": 1.0})
    expected = by_hand(model, encoder, request, lambda v: v, (request.texts, request.images))
    assert torch.equal(sampler(request, plain), expected)


def test_editing_follows_the_rule_of_three_branches(model: WeMMU, encoder: PromptEncoder, sampler: Sampler):
    request = make_request(Task.EDIT)

    def rule(un: Tensor, image: Tensor, full: Tensor) -> Tensor:
        return un + SAMPLING.image * (image - un) + SAMPLING.instruction * (full - image)

    branches = (["", ""], request.images[:, :0]), (["", ""], request.images), (request.texts, request.images)
    expected = by_hand(model, encoder, request, rule, *branches)
    torch.testing.assert_close(sampler(request, SAMPLING), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("task", "weight"), [(Task.T2I, SAMPLING.t2i), (Task.MULTI_EDIT, SAMPLING.multi)])
def test_the_other_rules_have_two_branches(
    model: WeMMU, encoder: PromptEncoder, sampler: Sampler, task: Task, weight: float
):
    request = make_request(task)
    branches = (["", ""], request.images[:, :0]), (request.texts, request.images)
    expected = by_hand(model, encoder, request, lambda un, full: un + weight * (full - un), *branches)
    torch.testing.assert_close(sampler(request, SAMPLING), expected, atol=1e-4, rtol=1e-4)


def test_images_are_repeated_by_their_seed_and_changed_by_another(sampler: Sampler):
    request = make_request(Task.EDIT)
    first = sampler(request, SAMPLING)
    assert torch.equal(sampler(request, SAMPLING), first)
    other = sampler(request, SAMPLING.model_copy(update={"seed": 5}))
    assert ((first - other).abs().amax((1, 2, 3)) > 1e-3).all()


@pytest.mark.parametrize("task", [Task.T2I, Task.EDIT])
def test_negative_words_take_the_place_of_none_where_the_guidance_of_the_words_begins(
    model: WeMMU, encoder: PromptEncoder, sampler: Sampler, task: Task
):
    request = replace(make_request(task), negatives=["a blue square", "a cross"])
    empty, none = [""] * 2, request.images[:, :0]
    if task is Task.T2I:
        w, branches = SAMPLING.t2i, [(request.negatives, none), (request.texts, none)]
        expected = by_hand(model, encoder, request, lambda n, full: n + w * (full - n), *branches)
    else:
        w_i, w_t = SAMPLING.image, SAMPLING.instruction
        branches = [(empty, none), (request.negatives, request.images), (request.texts, request.images)]
        rule = lambda un, n, full: un + w_i * (n - un) + w_t * (full - n)  # noqa: E731
        expected = by_hand(model, encoder, request, rule, *branches)
    torch.testing.assert_close(sampler(request, SAMPLING), expected, atol=1e-4, rtol=0)
    assert not torch.allclose(sampler(make_request(task), SAMPLING), expected, atol=1e-3)


def test_another_solver_is_used_where_it_is_asked_for(model: WeMMU, encoder: PromptEncoder, sampler: Sampler):
    request = make_request(Task.UNCONDITIONAL)

    def still(_: object, x: Tensor, ts: Tensor, on_step: object) -> Tensor:
        return x

    latents = Noise(SAMPLING.seed, 0, request.sample_ids).normal("latent", (model.vae.latent_channels, 2, 2))
    assert torch.equal(Sampler(model, encoder, SHIFT, {"euler": still})(request, SAMPLING), model.vae.decode(latents))


def test_images_do_not_depend_on_the_mode_the_trainer_left(backbones: Backbones, encoder: PromptEncoder):
    model = make_model(backbones).eval()
    for dropout in (m for m in model.dit.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.5
    sampler, request = Sampler(model, encoder, SHIFT), make_request(Task.EDIT)
    drawn = sampler(request, SAMPLING)
    model.train()
    model.dit.transformer_blocks[0].eval()
    before = [module.training for module in model.modules()]
    assert torch.equal(sampler(request, SAMPLING), drawn)
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("task", [Task.T2I, Task.EDIT])
def test_a_sample_alone_is_what_it_is_in_a_batch(sampler: Sampler, task: Task):
    together = sampler(make_request(task, [0, 1, 3]), SAMPLING)
    for row, sample in enumerate([0, 1, 3]):
        alone = sampler(make_request(task, [sample]), SAMPLING)[0]
        torch.testing.assert_close(together[row], alone, atol=2e-5, rtol=1e-4)


def test_images_have_the_size_asked_for_and_no_gradient(sampler: Sampler):
    made = sampler(make_request(Task.EDIT, size=(32, 64)), SAMPLING)
    assert made.shape == (2, 3, 32, 64)
    assert not made.requires_grad


@pytest.mark.parametrize("size", [(40, 32), (32, 40), (0, 32)], ids=str)
def test_impossible_sizes_are_refused(sampler: Sampler, size: tuple[int, int]):
    with pytest.raises(ValueError, match=r"multiples of 16 px|smaller than one"):
        sampler(make_request(Task.T2I, size=size), SAMPLING)


@pytest.mark.parametrize(
    ("text", "images", "task"),
    [
        ("a ring", 0, Task.T2I),
        ("", 0, Task.UNCONDITIONAL),
        ("a ring", 1, Task.EDIT),
        ("", 1, Task.RECONSTRUCTION),
        ("a ring", 2, Task.MULTI_EDIT),
    ],
)
def test_a_free_request_is_the_task_it_brings_the_things_for(text: str, images: int, task: Task):
    assert task_of(text, images) == task
