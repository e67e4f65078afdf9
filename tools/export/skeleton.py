"""The model of a stage without memory: names, shapes and configs, from the backbones' directories alone."""

from accelerate import init_empty_weights
from diffusers import AutoencoderDC, ModelMixin, SanaTransformer2DModel
from torch import nn
from transformers import AutoImageProcessor, Qwen2_5_VLForConditionalGeneration

from wemmu.config import StageRun
from wemmu.models.bridge import Bridge
from wemmu.models.model import WeMMU
from wemmu.models.vae import FrozenVAE
from wemmu.models.vlm import FrozenVLM
from wemmu.published.check import check_backbones
from wemmu.published.identity import identity


def skeleton(run: StageRun) -> WeMMU:
    """The model that `wemmu.models.weights.build_model` builds, every weight on the meta device.

    Raises:
        BackboneError: if a backbone's directory is not in the published layout.
        ValueError: if the VLM's weights are not those of its config.
    """
    check_backbones(run.backbones)
    vlm, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        run.backbones.vlm, device_map="meta", use_safetensors=True, output_loading_info=True
    )
    if odd := sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]])):
        raise ValueError(f"{run.backbones.vlm} is not whole or not of its config; first of it: {', '.join(odd[:5])}")
    pixels = AutoImageProcessor.from_pretrained(run.backbones.vlm, use_fast=True)
    frozen = FrozenVLM(vlm, pixels.image_mean, pixels.image_std)
    vae = FrozenVAE(_of_config(AutoencoderDC, run, "vae"))
    dit = _of_config(SanaTransformer2DModel, run, "transformer")
    with init_empty_weights():
        bridge = Bridge(run.bridge, frozen.language_model, vae.latent_channels, dit.config.caption_channels)
    return WeMMU(frozen, vae, bridge, dit)


def identities(run: StageRun) -> dict[str, str]:
    """Backbone -> what its weights are named, as checkpoints tell which they were trained beside."""
    sana = run.backbones.sana
    directories = {"vlm": run.backbones.vlm, "vae": sana / "vae", "dit": sana / "transformer"}
    return {part: identity(directory) for part, directory in directories.items()}


def shapes(model: nn.Module) -> dict[str, list[int]]:
    """Canonical name -> shape of all that a stage can train or carry."""
    named = model.named_parameters()
    return {name: list(p.shape) for name, p in named if name.startswith(("bridge.", "dit."))}


def _of_config(cls: type[ModelMixin], run: StageRun, part: str) -> ModelMixin:
    with init_empty_weights():
        return cls.from_config(cls.load_config(run.backbones.sana / part))
