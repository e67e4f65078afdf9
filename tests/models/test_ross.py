"""A VLM that reconstructs: the stock VLM in what it says, and each state where its piece of the image is."""

import pytest
import torch
from torch import Tensor

from tests.models.world import encode, make_questions, make_ross, patches_of, random_images
from wemmu.backbones.versions import image_kinds
from wemmu.config.schema import Backbones
from wemmu.prompts import PromptEncoder
from wemmu.recipes.ross.model import Ross
from wemmu.types import IGNORE_INDEX

PIXELS = {"target": "pixels", "head": {"kind": "regressor"}}


@pytest.fixture(scope="module")
def ross(backbones: Backbones) -> Ross:
    return make_ross(backbones)


def visual_states(ross: Ross, encoder: PromptEncoder, texts: list[str], images: Tensor) -> Tensor:
    return ross.states(encode(encoder, texts, images), images).images


@torch.no_grad()
def test_what_it_says_is_what_the_stock_model_says(ross: Ross, encoder: PromptEncoder) -> None:
    batch = make_questions(encoder, [0, 1, 2, 3], (48, 32))
    prompts = batch.prompts
    grid = torch.tensor([[1, 6, 4]] * 4)
    pixels = torch.cat([patches_of(ross, image) for image in batch.images[:, 0]])
    stock = ross.vlm(
        input_ids=prompts.input_ids,
        attention_mask=prompts.mask.long(),
        pixel_values=pixels,
        image_grid_thw=grid,
        **image_kinds(ross.vlm, prompts.input_ids),
    ).logits
    ours = ross.logits(ross.states(prompts, batch.images).text)
    assert torch.allclose(ours[prompts.mask], stock[prompts.mask], atol=1e-4)


@torch.no_grad()
def test_a_state_is_taken_where_its_piece_of_the_image_stands(ross: Ross, encoder: PromptEncoder) -> None:
    """Against the position in the text, with prompts of several lengths and two images each."""
    batch = make_questions(encoder, [0, 1, 2], (32, 48), images=2)
    states = ross.states(batch.prompts, batch.images)
    assert states.images.shape == (3, 2, 6, ross.language_model.config.hidden_size)
    for row in range(3):
        places = (batch.prompts.input_ids[row] == ross.image_token_id).nonzero().flatten()
        assert torch.equal(states.images[row].flatten(0, 1), states.text[row, places])


@torch.no_grad()
def test_images_never_see_the_question_but_the_images_before_them(ross: Ross, encoder: PromptEncoder) -> None:
    images = random_images(0, 1, 2, 3, 32, 32)
    one, other = (visual_states(ross, encoder, [text], images) for text in ("a red circle", "two squares above a ring"))
    assert torch.allclose(one, other, atol=1e-5)
    changed = images.clone()
    changed[:, 1] = 255 - changed[:, 1]
    third = visual_states(ross, encoder, ["a red circle"], changed)
    assert torch.equal(third[:, 0], one[:, 0])
    assert not torch.allclose(third[:, 1], one[:, 1])


@torch.no_grad()
def test_padding_and_neighbours_change_nothing(ross: Ross, encoder: PromptEncoder) -> None:
    together = make_questions(encoder, [0, 1, 2, 3])
    states = ross.states(together.prompts, together.images)
    for row in range(4):
        alone = make_questions(encoder, [row])
        own = ross.states(alone.prompts, alone.images)
        length = alone.prompts.input_ids.shape[1]
        assert torch.allclose(states.text[row, :length], own.text[0], atol=1e-5)
        assert torch.allclose(states.images[row], own.images[0], atol=1e-5)


def test_the_answer_and_its_end_are_wanted_where_they_are_predicted(encoder: PromptEncoder) -> None:
    batch = make_questions(encoder, [0, 1, 2, 3])
    for ids, wanted in zip(batch.prompts.input_ids, batch.labels, strict=True):
        places = (wanted != IGNORE_INDEX).nonzero().flatten()
        assert torch.equal(wanted[places], ids[places + 1])
        assert wanted[places[-1]] == encoder.tokenizer.eos_token_id
        assert places.diff().eq(1).all()
        before = encoder.tokenizer.decode(ids[: places[0] + 1])
        assert before.endswith("assistant\n")


@pytest.mark.parametrize("config", [PIXELS, {}], ids=["pixels", "latents"])
def test_a_target_stands_on_the_grid_of_the_tokens(backbones: Backbones, config: dict) -> None:
    """An image that is bright in the piece of one token is bright in that token's target."""
    ross = make_ross(backbones, **config)
    images = torch.zeros(1, 3, 48, 64, dtype=torch.uint8)
    images[..., 16:32, 48:64] = 255
    target, dark = ross.target(images), ross.target(torch.zeros_like(images))
    assert target.shape == (1, 3 * 16**2 if config else ross.vae.latent_channels, 3, 4)
    difference = (target - dark).abs().sum(1)[0].flatten()
    assert difference.argmax() == 1 * 4 + 3
    if config:
        assert difference.count_nonzero() == 1
        assert torch.equal(ross.targets.image(target, images), images / 127.5 - 1)


def test_a_layer_that_is_not_there_is_refused(backbones: Backbones) -> None:
    layers = len(make_ross(backbones).language_model.layers)
    with pytest.raises(ValueError, match=f"recipe.layer is {layers + 1}; valid choices: 0 to {layers}, last"):
        make_ross(backbones, layer=layers + 1)


@torch.no_grad()
def test_an_earlier_layer_is_the_one_counted_from_the_input(backbones: Backbones, encoder: PromptEncoder) -> None:
    ross = make_ross(backbones, layer=0)
    images = random_images(0, 2, 1, 3, 32, 32)
    states = visual_states(ross, encoder, ["a red circle"] * 2, images)
    assert torch.allclose(states[:, 0], ross.vision(images[:, 0]), atol=1e-6)


@torch.no_grad()
def test_the_last_layer_by_its_number_is_not_normed_and_last_is(backbones: Backbones, encoder: PromptEncoder) -> None:
    images = random_images(0, 2, 1, 3, 32, 32)
    ross = make_ross(backbones)
    layers = ross.language_model.layers
    before, behind = {}, visual_states(ross, encoder, ["a red circle"] * 2, images)
    for number in range(len(layers) + 1):
        ross.config = ross.config.model_copy(update={"layer": number})
        before[number] = visual_states(ross, encoder, ["a red circle"] * 2, images)
    assert torch.allclose(ross.language_model.norm(before[len(layers)]), behind, atol=1e-6)
    assert not torch.allclose(before[len(layers)], behind, atol=1e-2)
    # Each is what its layer makes of the one before: none is counted twice or left out.
    assert len({float(states.double().sum()) for states in before.values()}) == len(layers) + 1
    assert not ross.language_model.norm._forward_pre_hooks
