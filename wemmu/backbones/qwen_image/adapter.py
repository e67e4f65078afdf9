"""Qwen-Image as a velocity field: an MM-DiT, whose blocks attend over the tokens of image and condition together."""

import torch.nn.functional as F
from diffusers.models import QwenImageTransformer2DModel
from torch import Tensor

from wemmu.backbones.adapters import DiTStage
from wemmu.published.layout import BackboneError


class QwenImage:
    """See `wemmu.backbones.adapters.DiTAdapter`."""

    model_class = QwenImageTransformer2DModel
    input_weight = "img_in.weight"

    def caption_channels(self, dit: QwenImageTransformer2DModel) -> int:
        return dit.config["joint_attention_dim"]

    def latent_channels(self, dit: QwenImageTransformer2DModel) -> int:
        return dit.config["in_channels"] // dit.config["patch_size"] ** 2

    def widen(self, dit: QwenImageTransformer2DModel) -> None:
        raise BackboneError("Qwen-Image takes no source latents (recipe.bridge.source_latents); valid with it: Sana")

    def velocity(self, dit: QwenImageTransformer2DModel, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """Call the model, which takes and returns one token for p x p latents.

        Time and sign are those of `QwenImagePipeline`: it gives the model the scheduler's timestep / 1000, which is
        sigma, and sigma = 1 is noise, as t = 1 is. `FlowMatchEulerDiscreteScheduler` adds the output times
        (sigma_next - sigma) to x = (1 - sigma) x_0 + sigma eps, so the output is dx/dsigma = eps - x_0 = v.

        Raises:
            ValueError: for an image or a condition whose size the model cannot take.
        """
        p, (height, width), queries = dit.config["patch_size"], x_t.shape[-2:], states.shape[1]
        if height % p or width % p:
            raise ValueError(
                f"Qwen-Image packs {p} x {p} latents into a token and cannot take {height} x {width} latents; each "
                f"side of an image must be a multiple of {p} latents"
            )
        rows, columns, positions = height // p, width // p, len(dit.pos_embed.pos_freqs)
        # The condition's positions begin where those of the image, which are around 0, end.
        if max(rows, columns) // 2 + queries > positions:
            raise ValueError(
                f"Qwen-Image has {positions} positions, too few for {queries} tokens of the condition; generate "
                "smaller images, or take queries of design learnable_fixed"
            )
        # The channels of a token are ordered channel, row, column, which is pixel_unshuffle's order.
        tokens = F.pixel_unshuffle(x_t, p).flatten(2).transpose(1, 2)  # [B, rows * columns, C * p * p]
        # One image of one frame in each sample. Every state is real, so there is no mask.
        shapes = [[(1, rows, columns)]] * len(x_t)
        v = dit(tokens, encoder_hidden_states=states, timestep=t, img_shapes=shapes, return_dict=False)[0]
        return F.pixel_shuffle(v.transpose(1, 2).unflatten(2, (rows, columns)), p)

    def stage(self, dit: QwenImageTransformer2DModel, stage: int, stages: int) -> DiTStage:
        raise ValueError(
            "Qwen-Image is not divided into pipeline stages or tensor slices; valid: tp 1 and pp 1 on engine single or "
            "zero3"
        )


ADAPTER = QwenImage()
