"""The bridge as a component of a diffusers pipeline: config.json and safetensors, loaded strictly."""

from os import PathLike
from typing import Any, Self

from accelerate import init_empty_weights
from diffusers.configuration_utils import ConfigMixin, register_to_config

# Diffusers searches this module for `ModelMixin`, to know how to load a foreign component.
from diffusers.models import ModelMixin
from transformers import AutoConfig, AutoModel

from wemmu.backbones.versions import portable
from wemmu.recipes.wemmu.bridge import Bridge
from wemmu.recipes.wemmu.config import Bridge as BridgeConfig
from wemmu.recipes.wemmu.model import WeMMU


class WeMMUBridge(ModelMixin, Bridge, ConfigMixin):  # type: ignore[misc]  # as diffusers' own, of two config_names
    """A `Bridge` with its own config. Its tensors have their training names without `bridge.`."""

    @register_to_config
    def __init__(
        self, bridge: dict[str, Any], text_config: dict[str, Any], latent_channels: int, caption_channels: int
    ):
        """`bridge` is a dumped `wemmu.config.schema.Bridge`, `text_config` that of the VLM whose layers it copied."""
        # Only the layers are copied, so the language model needs no vocabulary.
        text = {**text_config, "vocab_size": 1, "pad_token_id": None}
        language_model = AutoModel.from_config(AutoConfig.for_model(text.pop("model_type"), **text))
        Bridge.__init__(self, BridgeConfig.model_validate(bridge), language_model, latent_channels, caption_channels)

    @classmethod
    def of(cls, model: WeMMU, config: BridgeConfig) -> Self:
        """Return the bridge of `model`, built with `config`, as a frozen component that shares the weights."""
        text_config = portable(model.vlm.language_model.config.to_diff_dict())
        # The precision of the weights is the caller's choice, not a property of the architecture.
        text_config.pop("dtype", None)
        with init_empty_weights():
            component = cls(
                bridge=config.model_dump(mode="json"),
                text_config=text_config,
                latent_channels=model.vae.latent_channels,
                caption_channels=model.caption_channels,
            )
        component.load_state_dict(model.bridge.state_dict(), strict=True, assign=True)
        return component.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # diffusers' first argument has a longer name
        cls, directory: str | PathLike[str] | None, **kwargs: Any
    ) -> Any:
        """Load like `ModelMixin.from_pretrained`, but strictly.

        Raises:
            ValueError: names missing and unexpected tensors.
        """
        with_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(directory, output_loading_info=True, **kwargs)
        component, info = loaded
        problems = {"lacks": info["missing_keys"], "holds unknown": info["unexpected_keys"]}
        if any(problems.values()):
            faults = [f"{what} {', '.join(sorted(names)[:5])}" for what, names in problems.items() if names]
            raise ValueError(f"the weights in {directory} are not those of its config.json: it {' and '.join(faults)}")
        component.requires_grad_(False)
        return (component, info) if with_info else component
