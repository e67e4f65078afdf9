"""Activation checkpointing changes what is kept for the backward pass, and no gradient."""

import pytest
import torch
from torch import Tensor

from tests.checkpoints import differing
from tests.models.flops import kept_by_autograd
from tests.models.world import make_batch, make_model
from wemmu.config.schema import Backbones
from wemmu.config.task import Task
from wemmu.noise import Noise
from wemmu.prompts import PromptEncoder
from wemmu.recipes.wemmu.model import WeMMU


def kept_and_gradients(model: WeMMU, encoder: PromptEncoder, trains: tuple[str, ...]) -> tuple[int, dict[str, Tensor]]:
    """Bytes that autograd keeps from forward to backward, weights apart, and what comes out."""
    model.freeze_all_but(trains)
    model.zero_grad(set_to_none=True)
    batch = make_batch(encoder, [0, 1], Task.EDIT)
    noise = Noise(0, 0, batch.sample_ids)
    with kept_by_autograd(model) as kept:
        condition = model.condition(batch.prompts, batch.images, (32, 32), noise)
        x_t = noise.normal("eps", (model.vae.latent_channels, 2, 2))
        loss = model.velocity(x_t, torch.tensor([0.2, 0.9]), condition).square().sum()
    loss.backward()
    return sum(kept.values()), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("trains", [("pathway", "position_mlp"), ("pathway", "position_mlp", "dit")], ids=len)
def test_recomputed_layers_have_the_same_gradients_and_keep_less(
    backbones: Backbones, encoder: PromptEncoder, trains: tuple[str, ...]
):
    model = make_model(backbones).train()
    kept, gradients = kept_and_gradients(model, encoder, trains)
    model.checkpoint_activations()
    kept_less, recomputed = kept_and_gradients(model, encoder, trains)
    assert kept_less < kept / 4
    assert differing(recomputed, gradients) == []


def test_checkpointing_leaves_inference_as_it_is(backbones: Backbones, encoder: PromptEncoder):
    model, batch = make_model(backbones), make_batch(encoder, [0, 1], Task.EDIT)

    @torch.no_grad()
    def states() -> Tensor:
        return model.condition(batch.prompts, batch.images, (32, 32), Noise(0, 0, batch.sample_ids)).states

    before = states()
    model.checkpoint_activations()
    assert torch.equal(states(), before)
