"""M-RoPE positions are those of the VLM itself."""

from itertools import product

import pytest
import torch
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from tests.models.world import encode, random_images
from wemmu.backbones.versions import image_kinds
from wemmu.noise import Noise
from wemmu.positions import image_grid_positions, prompt_positions, token_grid
from wemmu.prompts import PromptEncoder
from wemmu.recipes.wemmu.model import WeMMU
from wemmu.shapes.backbones import HIGH_PX, LOW_PX, MERGE, TOKEN_PX
from wemmu.types import Prompts

Grids = list[tuple[int, int]]

PROMPTS = [[], [(2, 2)], [(1, 5)], [(4, 3)], [(2, 3), (3, 1)], [(1, 1), (4, 4)]]


def rope_index(model: WeMMU, ids: list[int], grids: Grids) -> torch.Tensor:
    """The VLM's own positions [3, L] of a prompt whose images have `grids` in tokens."""
    thw = torch.tensor([[1, h * MERGE, w * MERGE] for h, w in grids]) if grids else None
    rows = torch.tensor([ids])
    # Of text alone the positions are those without images, whatever the tokens are.
    kinds = image_kinds(model.vlm.vlm, rows)
    return model.vlm.vlm.model.get_rope_index(rows, image_grid_thw=thw, **kinds)[0][:, 0]


@pytest.mark.parametrize("grids", PROMPTS, ids=str)
def test_prompt_positions_are_those_of_the_vlm(model: WeMMU, encoder: PromptEncoder, grids: Grids):
    ids = encoder.token_ids("move the small red circle", grids)
    ours, next_position = prompt_positions(ids, encoder.image_token_id, grids)
    assert torch.equal(ours, rope_index(model, ids, grids))
    assert next_position == ours.max() + 1


@pytest.mark.parametrize("grids", PROMPTS, ids=str)
@pytest.mark.parametrize("size", [(2, 2), (3, 5), (4, 1)], ids=str)
def test_queries_stand_where_the_vlm_would_put_an_image_of_their_size(
    model: WeMMU, encoder: PromptEncoder, grids: Grids, size: tuple[int, int]
):
    prompts = encoder(["make it blue"], [grids])
    queries = image_grid_positions(prompts.next_position, *size)[:, 0]
    with_image = [*prompts.input_ids[0].tolist(), *[encoder.image_token_id] * (size[0] * size[1])]
    assert torch.equal(queries, rope_index(model, with_image, [*grids, size])[:, -size[0] * size[1] :])


def test_positions_in_a_padded_batch_are_those_of_each_prompt_alone(model: WeMMU, encoder: PromptEncoder):
    texts, grids = ["a ring", "move the small red circle to the left"], [[(2, 3)], [(2, 3), (1, 2)]]
    batch = encoder(texts, grids)
    for b, (text, sizes) in enumerate(zip(texts, grids, strict=True)):
        alone = encoder([text], [sizes])
        assert torch.equal(batch.positions[:, b, batch.mask[b]], alone.positions[:, 0])
        assert batch.next_position[b] == alone.next_position[0]


def given_to_the_pathway(model: WeMMU, prompts: Prompts, images: torch.Tensor) -> torch.Tensor:
    """The positions [3, B, G] of the pathway's tokens for an image of 2 x 3 tokens."""
    seen: list[torch.Tensor] = []
    hook = model.bridge.pathway.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    try:
        model.condition(prompts, images, (2 * TOKEN_PX, 3 * TOKEN_PX), Noise(0, 0, torch.arange(len(images))))
    finally:
        hook.remove()
    return seen[0]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_pathway_tokens_stand_on_the_vit_tokens_of_their_images_and_of_the_image_to_make(
    model: WeMMU, encoder: PromptEncoder, count: int
):
    images = random_images(0, 2, count, 3, 48, 32)
    prompts = encode(encoder, ["a", "move the small red circle"], images)
    seen = given_to_the_pathway(model, prompts, images)
    for b in range(2):
        ids = torch.cat([prompts.input_ids[b, prompts.mask[b]], torch.full((6,), encoder.image_token_id)])
        own = rope_index(model, ids.tolist(), [*[(3, 2)] * count, (2, 3)])
        assert torch.equal(seen[:, b], own[:, ids == encoder.image_token_id])


def test_an_image_token_without_an_image_is_refused(encoder: PromptEncoder):
    ids = encoder.token_ids("a ring", [(2, 2)])
    with pytest.raises(ValueError, match="more runs"):
        prompt_positions(ids, encoder.image_token_id, [])


def test_an_image_that_the_prompt_does_not_hold_is_refused(encoder: PromptEncoder):
    with pytest.raises(ValueError, match="1 images were given"):
        prompt_positions(encoder.token_ids("a ring", []), encoder.image_token_id, [(2, 2)])


def test_an_image_larger_than_its_run_of_tokens_is_refused(encoder: PromptEncoder):
    with pytest.raises(ValueError, match="image 0 needs 3 x 2"):
        prompt_positions(encoder.token_ids("a ring", [(2, 2)]), encoder.image_token_id, [(3, 2)])


def test_a_image_has_as_many_tokens_as_the_processor_of_the_vlm_gives_it():
    """Every size that a bucket of the published autoencoder can have, and odd ones; Qwen2.5-VL's bounds on pixels."""
    sides = [*range(64, 2048, 32), 70, 98, 1006, 1022]
    for height, width in [*product(sides, sides[::7]), (28, 112), (500, 333)]:
        rows, columns = smart_resize(height, width, 28, 56 * 56, 12845056)
        assert token_grid(height, width, 28) == (rows // 28, columns // 28), (height, width)
    assert token_grid(1024, 1024, 28) == (37, 37)
    assert token_grid(512, 1024, 28) == (18, 37)
    # The miniature's grids are whole.
    assert all(token_grid(px, px, TOKEN_PX) == (px // TOKEN_PX,) * 2 for px in (LOW_PX, HIGH_PX))


def test_a_image_smaller_than_a_token_is_refused():
    with pytest.raises(ValueError, match="smaller than one"):
        token_grid(TOKEN_PX - 1, TOKEN_PX, TOKEN_PX)
