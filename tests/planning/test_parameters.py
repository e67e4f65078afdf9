"""The planned parameters are those of the real classes, to the last one."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.models import published as real
from wemmu.config.schema import Backbones
from wemmu.planning import autoencoder
from wemmu.planning.backbones import DCAE, Language, Sana, read_sizes
from wemmu.planning.parameters import count, dit_block, dit_ends, valid_tensor_degrees
from wemmu.recipes.wemmu.bridge import Bridge
from wemmu.recipes.wemmu.config import Bridge as BridgeConfig
from wemmu.recipes.wemmu.config import Queries
from wemmu.recipes.wemmu.model import WeMMU


def numbers(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def of_model(model: WeMMU) -> dict[str, int]:
    vlm, bridge = model.vlm.vlm, model.bridge
    return {
        "vision": numbers(vlm.model.visual),
        "language": numbers(vlm) - numbers(vlm.model.visual),
        "pathway": numbers(bridge.pathway),
        "vae_branch": numbers(bridge.vae_branch),
        "queries": numbers(bridge.queries),
        "position_mlp": numbers(bridge.position_mlp),
        "dit": numbers(model.dit),
        "vae": numbers(model.vae),
    }


def test_of_the_published_sizes(published: Backbones):
    planned = count(read_sizes(published), BridgeConfig())
    assert planned["vision"] + planned["language"] == real.QWEN_PARAMETERS
    assert (planned["dit"], planned["vae"]) == (real.SANA_PARAMETERS, real.DCAE_PARAMETERS)
    with torch.device("meta"):
        vlm = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**real.QWEN))
        assert planned["vision"] == numbers(vlm.model.visual)
        for design in ("noisy", "learnable_fixed", "learnable_dynamic"):
            config = BridgeConfig(queries=Queries(design=design), vae_branch=design == "noisy")
            bridge = Bridge(config, vlm.model.language_model, 32, 2304)
            planned = count(read_sizes(published), config)
            parts = {name: planned[name] for name in ("pathway", "vae_branch", "queries", "position_mlp")}
            assert parts == {name: numbers(getattr(bridge, name)) for name in parts}


def test_of_the_miniature(model: WeMMU, backbones: Backbones):
    assert count(read_sizes(backbones), BridgeConfig(position_table=8)) == of_model(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True},
        {"attention_bias": True, "norm_elementwise_affine": True, "out_channels": None, "patch_size": 2},
        {"num_cross_attention_heads": 16, "cross_attention_head_dim": 72, "num_attention_heads": 36},
    ],
)
def test_of_other_sana(changes: dict[str, Any]):
    config = {**real.SANA, "num_layers": 3, **changes}
    sana = Sana(**config)
    with torch.device("meta"):
        assert dit_ends(sana).parameters + 3 * dit_block(sana).parameters == numbers(SanaTransformer2DModel(**config))


@pytest.mark.parametrize(
    "changes",
    [
        {"downsample_block_type": "pixel_unshuffle", "upsample_block_type": "pixel_shuffle"},
        {"encoder_layers_per_block": [0, 1, 2, 3, 3, 3], "decoder_layers_per_block": [0, 1, 2, 3, 3, 3]},
        {"encoder_block_types": "EfficientViTBlock", "encoder_qkv_multiscales": [[], [3], [3, 5], [5], [5], []]},
    ],
)
def test_of_other_autoencoders(changes: dict[str, Any]):
    config = {**real.DCAE, **changes}
    sizes = DCAE(**config)
    with torch.device("meta"):
        vae = AutoencoderDC(**config)
    assert autoencoder.encoder_parameters(sizes) == numbers(vae.encoder)
    assert autoencoder.decoder_parameters(sizes) == numbers(vae.decoder)


def test_an_untied_head_is_counted(published: Backbones):
    sizes = read_sizes(published)
    untied = sizes.language.model_copy(update={"tie_word_embeddings": False})
    assert isinstance(untied, Language)
    other = count(sizes.model_copy(update={"language": untied}), BridgeConfig())
    assert other["language"] - count(sizes, BridgeConfig())["language"] == 151936 * 2048


def test_tensor_degrees_divide_the_feed_forward_and_do_not_outnumber_heads(published: Backbones):
    assert valid_tensor_degrees(read_sizes(published).dit) == [1, 2, 4, 5, 7, 8, 10, 14, 16, 20]
    assert valid_tensor_degrees(Sana(num_attention_heads=36, num_cross_attention_heads=16)) == [
        1,
        2,
        3,
        4,
        5,
        6,
        8,
        9,
        10,
        12,
        15,
        16,
    ]


@pytest.mark.parametrize("tp", [1, 2, 4, 5, 8])
def test_what_a_tensor_rank_has_of_a_block(published: Backbones, tp: int):
    """By hand, from the published sizes: vectors that are not split stay, heads are filled up to a multiple."""
    d, heads, cross_heads = 2240, {1: 70, 2: 35, 4: 18, 5: 14, 8: 9}[tp], {1: 20, 2: 10, 4: 5, 5: 4, 8: 3}[tp]
    itself = 4 * d * 32 * heads + d
    across = 4 * d * 112 * cross_heads + 3 * 112 * cross_heads + d
    feed_forward = 11200 // tp * (d + 1 + 9 + 1) + 5600 // tp * d
    assert dit_block(read_sizes(published).dit, tp).parameters == itself + across + feed_forward + 6 * d
