"""Facts in the config.json of a Qwen-Image transformer, without torch; see `wemmu.published.check`."""

from collections.abc import Mapping
from typing import Any

# Pipeline stages and tensor slices are not written for it.
ENGINES = ("single", "zero3")
# Fields of variants that take more than noisy latents, a time and a condition.
_FURTHER_INPUTS = {
    "guidance_embeds": "is distilled and takes a guidance scale",
    "use_additional_t_cond": "takes a second condition beside the time",
    "use_layer3d_rope": "takes an image in layers",
}


def latent_channels(config: Mapping[str, Any]) -> int:
    """Return the channels of the latents, of which the model takes p x p packed into a token.

    Raises:
        ValueError: if the model takes what this training does not give.
    """
    for field, what in _FURTHER_INPUTS.items():
        if config.get(field):
            raise ValueError(f"has {field}: this variant {what}, which this training does not give; take Qwen-Image")
    # The defaults of diffusers.
    packed, patch = config.get("in_channels", 64), config.get("patch_size", 2) ** 2
    returned = patch * (config.get("out_channels", 16) or packed)
    if packed != returned:
        raise ValueError(f"takes {packed} channels in a token and returns {returned}; a velocity has those of x_t")
    return int(packed // patch)
