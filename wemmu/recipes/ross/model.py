"""ROSS: a VLM that answers questions, and a head that reconstructs the image from the states of its tokens."""

from typing import NamedTuple

from torch import Tensor, nn

from wemmu.backbones.encoders import ImageEncoder
from wemmu.backbones.vae import FrozenVAE
from wemmu.backbones.vlm import places_of
from wemmu.positions import token_grid
from wemmu.recipes.ross.config import Ross as RossConfig
from wemmu.recipes.ross.heads import make_head
from wemmu.recipes.ross.targets import make_target
from wemmu.recipes.tuned_vlm import TunedVLM
from wemmu.types import Prompts


class States(NamedTuple):
    """text: [B, L, D], as the language-model head reads them; images: [B, N, rows * columns, D], the image tokens of
    the layer in the config."""

    text: Tensor
    images: Tensor


class Ross(TunedVLM):
    """The projector, the language model and the head are trained; the vision tower, the autoencoder, the teacher never.

    The projector is the tower's merger, `visual.merger`. Weights of the head have the names that begin `head.`.
    """

    prefixes, sharded = RossConfig.modules, RossConfig.sharded

    def __init__(
        self,
        vlm: nn.Module,
        mean: list[float],
        std: list[float],
        vae: FrozenVAE | None,
        config: RossConfig,
        teacher: ImageEncoder | None = None,
    ):
        """vae: of a target of latents. teacher: the frozen encoder of a target of features.

        Raises:
            ValueError: if the VLM lacks the layer.
        """
        super().__init__(vlm, mean, std)
        layers = len(self.language_model.layers)
        if config.layer != "last" and config.layer > layers:
            raise ValueError(f"recipe.layer is {config.layer}; valid choices: 0 to {layers}, last")
        self.vae, self.config = vae, config
        self.teacher = teacher
        self.targets = make_target(config, self.token_px, vae, teacher)
        self.head = make_head(config.head, self.language_model.config.hidden_size, self.targets.channels)

    def states(self, prompts: Prompts, images: Tensor) -> States:
        """Run the VLM over whole conversations, questions and answers.

        images: uint8 [B, N, 3, H, W], the images of each; N may be 0. Raises as `image_tokens`.
        """
        b, n = images.shape[:2]
        at_images = self.image_tokens(prompts, images)
        vision = self.vision(images.flatten(0, 1)) if n else None
        layer = self.config.layer
        # Transformers returns the last layer's states only after the final norm.
        unnormed: list[Tensor] = []
        hook = self.language_model.norm.register_forward_pre_hook(lambda _, inputs: unnormed.append(inputs[0]))
        try:
            seen = self.language_model(
                **self.inputs(prompts, at_images, vision),
                attention_mask=self.mask_without_cache(prompts),
                position_ids=prompts.positions,
                use_cache=False,
                output_hidden_states=layer != "last",
            )
        finally:
            hook.remove()
        chosen = seen.last_hidden_state if layer == "last" else (*seen.hidden_states[:-1], *unnormed)[layer]
        places = places_of(at_images, prompts.image_tokens[0])[..., None].expand(-1, -1, chosen.shape[-1])
        return States(seen.last_hidden_state, chosen.gather(1, places).reshape(b, n, -1 if n else 0, chosen.shape[-1]))

    def target(self, images: Tensor) -> Tensor:
        """Return the target of uint8 [M, 3, H, W] on the grid of the VLM's tokens: float32 [M, C, rows, columns]."""
        height, width = images.shape[-2:]
        return self.targets.encode(images, token_grid(height, width, self.token_px))
