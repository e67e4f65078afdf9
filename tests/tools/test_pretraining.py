"""The recipes of the tiny backbones still fit the classes they train."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC

from tools.pretraining import dit
from wemmu.backbones.vae import FrozenVAE

SANA = Path("assets/shapes/sana")


@pytest.mark.parametrize("phase", ["dit", "dit-layouts"])
def test_a_step_of_the_transformer_moves_it_and_its_text_encoder(phase: str) -> None:
    painter = dit.load(SANA, FrozenVAE(AutoencoderDC.from_pretrained(SANA / "vae").eval()))
    loss, parts = painter.loss(phase, step=0, batch_size=8)
    loss.backward()
    # A trained transformer explains most of the velocity, whose variance is about 2.
    assert 0 < parts["flow"] < 1
    for module in (painter.dit, painter.text):
        assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in module.parameters() if p.grad is not None)
        assert any(p.grad is not None for p in module.parameters())
