"""Facts in the config.json of a DC-AE, without torch; see `wemmu.published.check`."""

from collections.abc import Mapping
from typing import Any

# Fields by which latents are scaled or divided.
SCALES = ("scaling_factor",)


def latent_channels(config: Mapping[str, Any]) -> int:
    # The default of diffusers.
    return int(config.get("latent_channels", 32))


def latent_px(config: Mapping[str, Any]) -> int:
    # Each level of the encoder but the last one halves the sides; six are the default of diffusers.
    return int(2 ** (len(config.get("encoder_block_out_channels", range(6))) - 1))
