"""The whole model at its real size, 11 B parameters, on the meta device: shapes and names, but no numbers."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.models import published
from wemmu.backbones.vae import FrozenVAE
from wemmu.backbones.versions import rope_theta, transformers_5
from wemmu.backbones.vlm import FrozenVLM
from wemmu.config import load_curriculum
from wemmu.config.stage import Stage
from wemmu.noise import Noise
from wemmu.positions import token_grid
from wemmu.recipes.wemmu.bridge import Bridge
from wemmu.recipes.wemmu.component import WeMMUBridge
from wemmu.recipes.wemmu.config import Bridge as BridgeConfig
from wemmu.recipes.wemmu.model import WeMMU
from wemmu.types import Prefix

STAGES = load_curriculum(Path(__file__).parents[2] / "configs/shapes/curriculum.yaml").stages
WIDTH, CAPTION_WIDTH, LAYERS = 2048, 2304, 36
# Parameters of one layer of the language model: q, k, v with bias, o, the gated MLP, two norms.
LAYER = 2048 * (2048 + 1) + 2 * 256 * (2048 + 1) + 2048 * 2048 + 3 * 2048 * 11008 + 2 * 2048


@pytest.fixture(scope="module")
def real() -> WeMMU:
    with torch.device("meta"):
        vlm = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**published.QWEN))
        frozen = FrozenVLM(vlm, mean=[0.5] * 3, std=[0.5] * 3)
        vae = FrozenVAE(AutoencoderDC(**published.DCAE))
        dit = SanaTransformer2DModel(**published.SANA)
        bridge = Bridge(BridgeConfig(), frozen.language_model, vae.latent_channels, dit.config.caption_channels)
        return WeMMU(frozen, vae, bridge, dit)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def prefix_of(length: int, image_tokens: int) -> Prefix:
    """What the VLM would say about one prompt of `length` tokens."""
    kv = tuple(meta(1, 2, length, 128) for _ in range(LAYERS))
    mask, positions = meta(1, length, dtype=torch.bool), meta(3, 1, image_tokens, dtype=torch.long)
    return Prefix(kv, kv, mask, positions, meta(1, dtype=torch.long))


def test_the_backbones_have_the_published_numbers_of_parameters(real: WeMMU):
    assert count(real.vlm) == published.QWEN_PARAMETERS
    assert len(dict(real.vlm.named_parameters())) == published.QWEN_TENSORS
    assert count(real.dit) == published.SANA_PARAMETERS
    assert count(real.vae) == published.DCAE_PARAMETERS


def test_the_bridge_is_the_language_models_layers_and_little_more(real: WeMMU):
    assert count(real.bridge.pathway.layers) == LAYERS * LAYER == 2_774_771_712
    assert count(real.bridge.pathway.norm) == WIDTH
    assert count(real.bridge.vae_branch) == 32 * WIDTH + WIDTH
    assert count(real.bridge.position_mlp) == 64 * 64 * WIDTH + 2 * WIDTH * CAPTION_WIDTH + CAPTION_WIDTH**2
    assert count(real.bridge.queries) == 0


def test_a_checkpoint_of_the_last_stage_holds_these_names_and_shapes(real: WeMMU):
    real.freeze_all_but(STAGES[-1].trains)
    shapes = {name: list(p.shape) for name, p in real.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in shapes} == {"bridge", "dit"}
    # Every tensor of a layer, under the names of the VLM's own file.
    of_vlm = {n: list(p.shape) for n, p in real.vlm.language_model.named_parameters() if n.startswith("layers.")}
    of_pathway = {
        n.removeprefix("bridge.pathway."): s for n, s in shapes.items() if n.startswith("bridge.pathway.layers.")
    }
    assert of_pathway == of_vlm
    assert len(of_vlm) == 12 * LAYERS
    rest = {n: s for n, s in shapes.items() if n.startswith("bridge.") and ".layers." not in n}
    assert rest == {
        "bridge.pathway.norm.weight": [WIDTH],
        "bridge.vae_branch.linear.weight": [WIDTH, 32],
        "bridge.vae_branch.linear.bias": [WIDTH],
        "bridge.position_mlp.table": [64, 64, WIDTH],
        "bridge.position_mlp.gate.weight": [CAPTION_WIDTH, WIDTH],
        "bridge.position_mlp.up.weight": [CAPTION_WIDTH, WIDTH],
        "bridge.position_mlp.down.weight": [CAPTION_WIDTH, CAPTION_WIDTH],
    }
    assert shapes["dit.caption_projection.linear_1.weight"] == [2240, CAPTION_WIDTH]
    assert shapes["dit.transformer_blocks.19.attn2.to_k.weight"] == [2240, 2240]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_parameter_is_either_frozen_or_trained_by_exactly_one_named_module(real: WeMMU, stage: Stage):
    real.freeze_all_but(stage.trains)
    trained = 0
    for name, parameter in real.named_parameters():
        owner = [module for module, prefixes in real.prefixes.items() if name.startswith(prefixes)]
        assert len(owner) == (0 if name.startswith(("vlm.", "vae.")) else 1), name
        assert parameter.requires_grad == (owner != [] and owner[0] in stage.trains), name
        trained += parameter.numel() * parameter.requires_grad
    assert trained == count(real.bridge) + (count(real.dit) if "dit" in stage.trains else 0)


@pytest.mark.parametrize(("pixels", "side", "vae_pixels"), [(512, 18, 576), (1024, 37, 1184)])
def test_a_image_has_as_many_latents_as_vlm_tokens_on_the_way_through(
    real: WeMMU, pixels: int, side: int, vae_pixels: int, monkeypatch: pytest.MonkeyPatch
):
    assert token_grid(pixels, pixels, real.vlm.token_px) == (side, side)
    patches, encoded = [], []
    encode = real.vae.vae.encode

    def watched_encode(x: Tensor):
        encoded.append(tuple(x.shape))
        return encode(x)

    def vision(x: Tensor, grid: Tensor) -> Tensor:
        # The tower reads the grid's numbers, which meta tensors have not.
        patches.append(tuple(x.shape))
        return meta(len(x) // real.vlm.merge**2, WIDTH)

    def rotary(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        # Autocast, which it switches off, does not know the meta device.
        assert positions.shape == (3, 1, 2 * side * side)
        # transformers 5 interleaves the three axes here, transformers 4 in the attention.
        shape = (*positions.shape[transformers_5() :], 128)
        return meta(*shape), meta(*shape)

    monkeypatch.setattr(real.bridge.pathway.rotary, "forward", rotary)
    monkeypatch.setattr(real.vae.vae, "encode", watched_encode)
    monkeypatch.setattr(real.vlm.vlm.model.visual, "forward", vision)
    image = meta(1, 1, 3, pixels, pixels, dtype=torch.uint8)
    latents = real.input_latents(image)
    assert encoded == [(1, 3, vae_pixels, vae_pixels)]
    assert latents.shape == (1, 1, 32, side, side)
    assert real.vlm.vision(image[0]).shape == (1, side * side, WIDTH)
    # Four patches to a token, each of 14 x 14 px in two frames.
    assert patches == [(4 * side * side, 3 * 2 * 14 * 14)]
    noise = Noise(0, 0, torch.tensor([0]), "meta")
    condition = real.bridge(prefix_of(side * side + 30, side * side), latents, (side, side), noise)
    assert condition.states.shape == (1, side * side, CAPTION_WIDTH)
    latent_side = pixels // real.vae.latent_px
    x_t = meta(1, 32, latent_side, latent_side)
    assert real.velocity(x_t, meta(1), condition).shape == x_t.shape
    assert real.vae.decode(x_t).shape == (1, 3, pixels, pixels)


def test_the_exported_bridge_finds_its_own_architecture(real: WeMMU):
    with torch.device("meta"):
        text_config = real.vlm.language_model.config.to_diff_dict()
        component = WeMMUBridge(BridgeConfig().model_dump(mode="json"), text_config, 32, CAPTION_WIDTH)
    shapes = {name: p.shape for name, p in component.named_parameters()}
    assert shapes == {name: p.shape for name, p in real.bridge.named_parameters()}
    assert rope_theta(component.pathway.rotary.config) == 1e6
