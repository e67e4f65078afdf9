"""The vision towers without waiting: bit for bit what transformers' own forward computes."""

import pytest
import torch
from torch import Tensor
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from wemmu.backbones.adapters import adapter_of
from wemmu.backbones.vision_tower import Grid

TEXT = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
TOWER = {
    "depth": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "patch_size": 8,
    "out_hidden_size": 64,
}
ROPE = {"rope_type": "default", "mrope_section": [4, 2, 2]}
MODELS = {
    "Qwen2.5-VL": lambda: Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=TEXT | {"num_key_value_heads": 2, "rope_scaling": ROPE},
            # Windows of 4 x 4 merged tokens, in two of four layers.
            vision_config=TOWER | {"window_size": 64, "fullatt_block_indexes": [1, 3]},
        )
    ),
    "Qwen3-VL": lambda: Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config=TEXT | {"num_key_value_heads": 2, "head_dim": 16, "rope_scaling": ROPE},
            vision_config=TOWER | {"deepstack_visual_indexes": [0, 2], "num_position_embeddings": 64},
        )
    ),
}
# Images, rows and columns of patches: windows cut at no edge, at one and at both, and an image smaller than a window.
GRIDS = [(1, 16, 16), (2, 8, 20), (2, 22, 26), (3, 2, 4)]


def own_output(out: object) -> Tensor:
    """Tokens and DeepStack's features of transformers 4 and 5."""
    if isinstance(out, Tensor):
        return out
    if type(out) is tuple:
        return torch.cat([out[0], *out[1]], dim=-1)
    return torch.cat([out.pooler_output, *(getattr(out, "deepstack_features", None) or [])], dim=-1)


@pytest.mark.parametrize("name", MODELS)
def test_a_tower_that_asks_nobody_computes_the_bits_of_transformers(name: str):
    torch.manual_seed(0)
    vlm = MODELS[name]()
    tower = vlm.model.visual
    adapter_of(vlm).prepare(vlm)
    for images, rows, columns in GRIDS:
        # Each patch: 3 channels, 2 frames, 8 x 8 px.
        patches = torch.randn(images * rows * columns, 3 * 2 * 8 * 8)
        grid = torch.tensor([[1, rows, columns]] * images)
        theirs = own_output(type(tower).forward(tower, patches, grid))
        gradients = torch.autograd.grad(theirs.square().sum(), list(tower.parameters()))
        ours = adapter_of(vlm).vision(vlm, patches, Grid(images, rows, columns))
        assert torch.equal(ours, theirs)
        for mine, own in zip(
            torch.autograd.grad(ours.square().sum(), list(tower.parameters())), gradients, strict=True
        ):
            assert torch.allclose(mine, own, rtol=1e-4, atol=1e-5 * float(own.abs().max()))
        # A tensor of grids, as whole models of transformers give it.
        assert torch.equal(own_output(tower(patches, grid)), theirs)
