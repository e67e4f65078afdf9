"""Facts in the config.json of Qwen-Image's autoencoder, without torch; see `wemmu.published.check`."""

from collections.abc import Mapping
from typing import Any

# Fields by which latents are scaled or divided.
SCALES = ("latents_std",)


def latent_channels(config: Mapping[str, Any]) -> int:
    # The default of diffusers.
    return int(config.get("z_dim", 16))


def latent_px(config: Mapping[str, Any]) -> int:
    # Each entry halves the sides; three are the default of diffusers.
    return int(2 ** len(config.get("temperal_downsample", range(3))))
