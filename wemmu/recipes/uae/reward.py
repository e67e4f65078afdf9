"""The reward of a caption: the similarity of the image and its reconstruction under a frozen encoder."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wemmu.backbones.encoders import ImageEncoder, cosine, load_encoder
from wemmu.config.schema import StageRun
from wemmu.recipes.uae.config import HELD_OUT, CaptionTuning, ColdStart
from wemmu.recipes.uae.config import UAE as UAEConfig
from wemmu.recipes.uae.generator import Renderer

PIXELS_SIDE = 16


class Pixels(nn.Module):
    """Scales an image down and takes its mean away, so that a cosine of two is their correlation."""

    def embed(self, images: Tensor) -> Tensor:
        """As `ImageEncoder.embed`."""
        low, high = torch.stack(images.detach().aminmax()).tolist()
        if low < 0 or high > 1:
            raise ValueError(f"an image holds values from {low:g} to {high:g}; valid: 0 to 1")
        small = F.interpolate(images.float(), (PIXELS_SIDE, PIXELS_SIDE), mode="area")
        return (small - small.mean((1, 2, 3), keepdim=True)).flatten(1)


Encoder = ImageEncoder | Pixels


def encoders_of(run: StageRun) -> dict[str, Encoder]:
    """Load what a stage compares images with: `reward`, and each further one under its name after `HELD_OUT`.

    Raises:
        BackboneError: for a directory that holds no known encoder.
    """
    assert isinstance(run.recipe, UAEConfig)
    config, objective = run.recipe.reward, run.stage.objective
    if isinstance(objective, CaptionTuning):
        return {}
    held_out = {} if isinstance(objective, ColdStart) else config.held_out
    named = {"reward": config.encoder, **{HELD_OUT + name: encoder for name, encoder in held_out.items()}}
    return {name: Pixels() if one == "pixels" else load_encoder(one) for name, one in named.items()}


class ReconstructionReward:
    """Renders captions and compares the reconstructions with the images; a function of these and the seed alone."""

    def __init__(self, renderer: Renderer):
        self.renderer, self.config = renderer, renderer.config
        encoders: Any = dict(renderer.model.encoders)
        self.encoder: Encoder = encoders.pop("reward")
        self.held_out: dict[str, Encoder] = {name.removeprefix(HELD_OUT): one for name, one in encoders.items()}

    @torch.no_grad()
    def __call__(self, captions: Sequence[str], images: Tensor, sample_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the rewards of G captions for each image, [B, G], and the cosines that count for nothing, by name.

        images: uint8 [B, 1, 3, H, W]; captions: G for each, in their order; sample_ids: int64 [B].

        Raises:
            ValueError: if the control `deranged` has one image only.
        """
        group = len(captions) // len(images)
        made = self._rendered(captions, images.repeat_interleave(group, 0), sample_ids.repeat_interleave(group))
        rewards, also = self.compared(made, images)
        if self.renderer.model.generator.offloaded:
            self._move_encoders("cpu")
        return rewards, also

    @torch.no_grad()
    def compared(self, made: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return rewards and further cosines of G reconstructions of each image, [B * G, 3, H, W] in [0, 1].

        Raises:
            ValueError: as for captions.
        """
        self._move_encoders(images.device)
        own = compared = images[:, 0]
        if self.config.reward.control == "deranged":
            if len(own) < 2:
                raise ValueError(
                    "recipe.reward.control: deranged needs another image in the micro-batch, which has one; "
                    "set memory.micro_batch to 2 or more"
                )
            compared = own.roll(1, 0)
        rewards = self._cosines(self.encoder, made, compared)
        if self.config.reward.control == "constant":
            rewards = torch.ones_like(rewards)
        also = {name: self._cosines(encoder, made, own) for name, encoder in self.held_out.items()}
        if self.config.reward.control != "none":
            also["own"] = self._cosines(self.encoder, made, own)
        return rewards, also

    def _rendered(self, captions: Sequence[str], images: Tensor, sample_ids: Tensor) -> Tensor:
        """Render each caption of a sample once, so that equal captions have exactly equal rewards."""
        if self.config.cond_encoder == "policy":
            # Ranks that share the policy must render equally often.
            return self.renderer(captions, images, sample_ids)
        pairs = list(zip(captions, sample_ids.tolist(), strict=True))
        first = {pair: row for row, pair in reversed(list(enumerate(pairs)))}
        rows = sorted(first.values())
        made = self.renderer([captions[row] for row in rows], images[rows], sample_ids[rows])
        places = {pairs[row]: place for place, row in enumerate(rows)}
        return made[[places[pair] for pair in pairs]]

    def _cosines(self, encoder: Encoder, made: Tensor, images: Tensor) -> Tensor:
        """[B, G] of reconstructions [B * G, ...] and images [B, ...]."""
        features = encoder.embed(images.float() / 255)
        group = len(made) // len(images)
        return cosine(encoder.embed(made), features.repeat_interleave(group, 0)).unflatten(0, (-1, group))

    def _move_encoders(self, device: torch.device | str) -> None:
        self.renderer.model.encoders.to(device)
