"""Backbones of the miniature's classes with random weights, in the published layout; also for benchmarks."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from wemmu.config.schema import Backbones
from wemmu.shapes.backbones import DIT_CONFIG, VAE_CONFIG, vlm_config
from wemmu.shapes.processor import save_processor, special_ids


def make_backbones(
    root: Path, layers: int | None = None, text: dict[str, Any] | None = None, dit: dict[str, Any] | None = None
) -> Backbones:
    """Backbones under `root`, in torch's default type.

    layers: of the VLM's language model and of the DiT; text, dit: further fields of their configs; what is not given is
    the miniature's.
    """
    processor: Any = save_processor(root / "vlm")
    torch.manual_seed(1)
    depth = {} if layers is None else {"num_hidden_layers": layers}
    config = vlm_config(len(processor.tokenizer), special_ids(processor))
    config["text_config"] |= depth | (text or {})
    config["vision_config"]["out_hidden_size"] = config["text_config"]["hidden_size"]
    blocks = {} if layers is None else {"num_layers": layers}
    Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)).save_pretrained(root / "vlm")
    AutoencoderDC(**VAE_CONFIG, scaling_factor=0.5).save_pretrained(root / "sana/vae")
    SanaTransformer2DModel(**DIT_CONFIG | blocks | (dit or {})).save_pretrained(root / "sana/transformer")
    FlowMatchEulerDiscreteScheduler(shift=4.0).save_pretrained(root / "sana/scheduler")
    return Backbones.model_validate({"vlm": root / "vlm", "sana": root / "sana"})
