"""Facts in the config.json of a Sana, without torch; see `wemmu.published.check`."""

from collections.abc import Mapping
from typing import Any

ENGINES = ("single", "zero3", "hybrid")


def latent_channels(config: Mapping[str, Any]) -> int:
    """Raise ValueError for a variant with inputs that this training does not have."""
    if config.get("guidance_embeds"):
        raise ValueError(
            "has guidance_embeds: a Sana-Sprint, distilled to few steps, needs the guidance as an input, which "
            "this training does not give; use a Sana without it, as Sana_1600M_1024px_diffusers"
        )
    # The default of diffusers.
    return int(config.get("in_channels", 32))
