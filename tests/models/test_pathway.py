"""The generation pathway is the VLM's own stack, reading a prefix that it cannot change."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.models.world import make_batch
from wemmu.prompts import PromptEncoder
from wemmu.recipes.wemmu.model import WeMMU
from wemmu.types import Batch, Prefix

TOKENS = 5


@pytest.fixture
def batch(encoder: PromptEncoder) -> Batch:
    return make_batch(encoder, [0, 1])


@pytest.fixture
def prefix(model: WeMMU, batch: Batch) -> Prefix:
    return model.vlm.prefix(batch.prompts, batch.images)


def tokens(model: WeMMU) -> tuple[Tensor, Tensor]:
    """Pathway tokens [2, G, D] of noise, and positions for them."""
    width = model.vlm.language_model.config.hidden_size
    noise = torch.randn(2, TOKENS, width, generator=torch.Generator().manual_seed(0))
    return noise, (30 + torch.arange(TOKENS)).expand(3, 2, -1)


@torch.no_grad()
def test_with_its_first_weights_and_a_causal_mask_it_continues_the_prompt_as_the_vlm_does(
    model: WeMMU, encoder: PromptEncoder, prefix: Prefix, batch: Batch
):
    answer = torch.tensor(encoder.tokenizer(" a red circle above two rings")["input_ids"])
    g = len(answer)
    positions = batch.prompts.next_position[None, :, None] + torch.arange(g).expand(3, 2, -1)
    causal = torch.ones(g, g, dtype=torch.bool).tril().expand(2, -1, -1)
    mask = torch.cat([prefix.mask[:, None].expand(-1, g, -1), causal], dim=-1)
    embedded = model.vlm.language_model.embed_tokens(answer).expand(2, -1, -1)
    ours = model.bridge.pathway.run(embedded, positions, prefix, mask)[:, :, 0]
    for b in range(2):
        real = batch.prompts.mask[b]
        ids = torch.cat([batch.prompts.input_ids[b, real], answer])[None]
        own = torch.cat([batch.prompts.positions[:, b, real], positions[:, b]], dim=-1)[:, None]
        embeds = model.vlm.language_model.embed_tokens(ids)
        at_images = (ids == model.vlm.image_token_id)[..., None]
        embeds = embeds.masked_scatter(at_images, model.vlm.vision(batch.images[b]))
        seen = model.vlm.language_model(inputs_embeds=embeds, position_ids=own).last_hidden_state
        torch.testing.assert_close(ours[b], seen[0, -g:], atol=2e-5, rtol=1e-5)


def test_the_prefix_is_not_changed_bit_for_bit(model: WeMMU, prefix: Prefix):
    before = [t.clone() for t in prefix.keys + prefix.values]
    states = model.bridge.pathway(*tokens(model), prefix)
    states.sum().backward()
    model.bridge.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(before, prefix.keys + prefix.values, strict=True))


@torch.no_grad()
def test_padding_of_the_prefix_has_no_influence(model: WeMMU, prefix: Prefix):
    padding = ~prefix.mask[:, None, :, None]
    assert padding.any()
    loud = replace(
        prefix,
        keys=tuple(torch.where(padding, 100.0, k) for k in prefix.keys),
        values=tuple(torch.where(padding, -100.0, v) for v in prefix.values),
    )
    assert torch.equal(model.bridge.pathway(*tokens(model), prefix), model.bridge.pathway(*tokens(model), loud))


@torch.no_grad()
@pytest.mark.parametrize(("changed", "watched"), [(TOKENS - 1, 0), (0, TOKENS - 1)], ids=["later", "earlier"])
def test_tokens_see_each_other_both_ways(model: WeMMU, prefix: Prefix, changed: int, watched: int):
    noise, positions = tokens(model)
    other = noise.clone()
    other[:, changed] = -other[:, changed]
    difference = model.bridge.pathway(noise, positions, prefix) - model.bridge.pathway(other, positions, prefix)
    assert (difference[:, watched].abs().amax(-1) > 1e-4).all()


@torch.no_grad()
def test_samples_do_not_see_each_other(model: WeMMU, prefix: Prefix):
    noise, positions = tokens(model)
    other = noise.clone()
    other[1] = -other[1]
    assert torch.equal(
        model.bridge.pathway(noise, positions, prefix)[0], model.bridge.pathway(other, positions, prefix)[0]
    )


def test_every_token_sees_every_token_of_the_prefix(model: WeMMU, prefix: Prefix):
    values = prefix.values[0].clone().requires_grad_()
    watched = replace(prefix, values=(values, *prefix.values[1:]))
    for token in (0, TOKENS - 1):
        values.grad = None
        model.bridge.pathway(*tokens(model), watched)[:, token].square().sum().backward()
        felt = values.grad.abs().amax(dim=(1, 3)) > 0
        assert torch.equal(felt, prefix.mask)
    model.bridge.zero_grad()


@pytest.mark.parametrize("ids", [[0, 4], [2]], ids=["equal lengths", "alone"])
def test_a_prefix_without_padding_gives_the_same_without_a_mask(model: WeMMU, encoder: PromptEncoder, ids: list[int]):
    batch = make_batch(encoder, ids)
    prefix = model.vlm.prefix(batch.prompts, batch.images)
    assert not prefix.padded
    noise, positions = tokens(model)
    found = []
    for each in (prefix, replace(prefix, padded=True)):
        of_each = noise[: len(ids)].clone().requires_grad_()
        model.bridge.pathway(of_each, positions[:, : len(ids)], each).square().sum().backward()
        found.append((of_each.grad, model.bridge.pathway.layers[0].self_attn.q_proj.weight.grad.clone()))
        model.bridge.zero_grad()
    for without, with_mask in zip(*found, strict=True):
        torch.testing.assert_close(without, with_mask, atol=1e-5, rtol=1e-4)


def test_prompts_of_different_lengths_make_a_padded_prefix(prefix: Prefix):
    assert prefix.padded
