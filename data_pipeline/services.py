"""The models of the chain: a VLM that writes captions, an autoencoder that computes latents.

Each runs in its own process, a Ray actor, with a GPU if there is one, and serves all workers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor

from wemmu.backbones.versions import image_kinds
from wemmu.backbones.weights import load_autoencoder, load_vlm
from wemmu.config.prepare import Captioner
from wemmu.config.shards import LatentSettings
from wemmu.pixels import stored_pixels
from wemmu.prompts import PromptEncoder
from wemmu.published.check import check
from wemmu.published.known import VLM


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class CaptionService:
    """Writes greedy captions, so an image has the same caption in every run."""

    def __init__(self, config: Captioner):
        self._config, self._device = config, _device()
        dtype = torch.bfloat16 if self._device == "cuda" else torch.float32
        check(config.vlm, VLM, with_processor=True)
        # `generate` is a mixin of its class, which only the checkpoint names.
        self._vlm: Any
        self._vlm, _ = load_vlm(config.vlm, dtype)
        self._vlm.to(self._device).eval()
        self._processor = AutoProcessor.from_pretrained(config.vlm, use_fast=True)
        self._encoder = PromptEncoder(self._processor)
        # Left padding: all prompts of a batch end at the same place, where the answers begin.
        self._processor.tokenizer.padding_side = "left"

    @torch.no_grad()
    def caption(self, images: Sequence[Image.Image]) -> list[str]:
        seen = self._processor.image_processor(images=list(images), return_tensors="pt")
        # Patches of a token: merge_size by merge_size.
        grids = seen["image_grid_thw"][:, 1:] // self._processor.image_processor.merge_size
        rows = [self._encoder.token_ids(self._config.instruction, [(h, w)]) for h, w in grids.tolist()]
        inputs = self._processor.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self._device) | seen.to(
            self._device
        )
        kinds = image_kinds(self._vlm, inputs["input_ids"])
        made = self._vlm.generate(**inputs, **kinds, max_new_tokens=self._config.max_tokens, do_sample=False)
        answers = made[:, inputs["input_ids"].shape[1] :]
        return [t.strip() for t in self._processor.batch_decode(answers, skip_special_tokens=True)]


class LatentService:
    """Computes the latents that training would compute from the same files."""

    def __init__(self, directory: Path, dtype: str):
        self._device = _device()
        vae, report = load_autoencoder(directory, torch.float32)
        self._vae = vae.to(self._device)
        self._dtype, self._name, self._sha256 = getattr(torch, dtype), dtype, report.sha256

    def settings(self, size: tuple[int, int]) -> LatentSettings:
        """Return the settings of the latents of images of `size` = (height, width)."""
        return LatentSettings(
            vae=self._sha256,
            scaling_factor=self._vae.scaling_factor,
            dtype=self._name,
            channels=self._vae.latent_channels,
            rows=size[0] // self._vae.latent_px,
            columns=size[1] // self._vae.latent_px,
        )

    def encode(self, files: Sequence[bytes]) -> list[bytes]:
        """Encode images of one size: latents [channels, rows, columns] of each as little-endian bytes."""
        pixels = torch.stack([stored_pixels(file) for file in files])
        latents = self._vae.encode(pixels.to(self._device)).to(self._dtype).cpu().contiguous()
        return [row.view(torch.uint8).numpy().tobytes() for row in latents]
