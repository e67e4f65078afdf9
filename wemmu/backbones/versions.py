"""Handles the differences between transformers 4.57 and 5.

Most of it would fail silently: an argument of a wrong name is swallowed, and a fixed index into a layer's output takes
the first sample instead of the states.
"""

import inspect
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn


def transformers_5() -> bool:
    return int(transformers.__version__.partition(".")[0]) >= 5


def with_cache(module: nn.Module, kv: Any) -> dict[str, Any]:
    """Return the argument that gives a language model or one of its layers a cache of keys and values."""
    cls: Any = type(module)
    return {_cache_argument(cls): kv}


@cache
def _cache_argument(cls: type[nn.Module]) -> str:
    """Return the name of the argument: `cache` since 5.20, `past_key_values` before."""
    known = inspect.signature(cls.forward).parameters
    for name in ("cache", "past_key_values"):
        if name in known:
            return name
    raise ValueError(
        f"{cls.__name__} of the installed transformers takes its cache neither as `cache` nor as `past_key_values`; "
        "install a version between 4.57 and 5.24"
    )


def layer_states(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the states [B, L, D] of a layer's output, which is a tuple in some versions and a tensor in others."""
    return output[0] if isinstance(output, tuple) else output


def image_kinds(vlm: Any, ids: Tensor) -> dict[str, Tensor]:
    """Return the argument that says which of the ids [B, L] are image tokens, where the whole VLM takes one.

    transformers 5 needs it for the positions of images; transformers 4 looks for the ids itself.
    """
    if "mm_token_type_ids" not in inspect.signature(type(vlm).forward).parameters:
        return {}
    return {"mm_token_type_ids": (ids == vlm.config.image_token_id).int()}


def vlm_config(cls: type[Any], directory: Path) -> Any:
    """Return the config of a VLM; transformers 4 ignores the rotary settings that transformers 5 writes."""
    config = cls.config_class.from_pretrained(directory)
    text = config.text_config
    if not transformers_5() and (rope := getattr(text, "rope_parameters", None)):
        text.rope_theta, text.rope_scaling = rope["rope_theta"], _scaling(rope)
        del text.rope_parameters
    return config


def rope_theta(text_config: Any) -> float:
    """Return the base of the rotary frequencies of a language model's config, an object or a dict."""
    fields = text_config if isinstance(text_config, Mapping) else vars(text_config)
    return float((fields.get("rope_parameters") or fields)["rope_theta"])


def portable(text_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a language model's config with its rotary settings in the form that both versions read."""
    fields = dict(text_config)
    if rope := fields.pop("rope_parameters", None):
        fields |= {"rope_theta": rope["rope_theta"], "rope_scaling": _scaling(rope)}
    return fields


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in rope.items() if key != "rope_theta"}
