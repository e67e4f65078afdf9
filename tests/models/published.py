"""The published configurations of the real backbones, as the package has them, and what they must add up to.

Qwen2.5-VL-3B-Instruct and the transformer and vae of Sana_1600M_1024px_diffusers. The VLM's parameter count is the
published one; for Sana and DC-AE no exact count was found in print, so theirs guard the configurations.
"""

from typing import Any

from wemmu.published.configs import CONFIGS

QWEN_PARAMETERS, QWEN_TENSORS = 3_754_622_976, 824
SANA_PARAMETERS = 1_604_462_752
DCAE_PARAMETERS = 312_250_275


def _fields(name: str) -> dict[str, Any]:
    """The fields of a config.json but for those that name its class."""
    return {k: v for k, v in CONFIGS[name].items() if k not in ("_class_name", "architectures", "model_type")}


# As in its config.json: the language model's fields stand at the top, where later versions nest them.
QWEN = _fields("Qwen2.5-VL-3B-Instruct")
SANA, DCAE = (_fields(f"Sana_1600M_1024px_diffusers/{part}") for part in ("transformer", "vae"))
