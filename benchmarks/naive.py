"""The step that is taken where nothing is known of a frozen prefix: our baseline, in Hugging Face's own class.

Prompt, VAE tokens and queries are one sequence in one VLM, as in MetaQuery: autograd goes through the whole of it. What
follows is ours, so the loss is the same: `wemmu.recipes.wemmu.loss` on this model, its DiT and its VAE.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from wemmu.backbones.sana.adapter import ADAPTER
from wemmu.noise import Noise
from wemmu.positions import image_grid_positions, token_grid
from wemmu.recipes.wemmu.model import WeMMU
from wemmu.types import Condition, Prompts

Mask = Literal["pathway", "causal"]


@dataclass(frozen=True)
class Way:
    """How the naive step is taken.

    trained: the VLM's layers learn, as ours trains their copy; else nothing of the VLM does and, as in MetaQuery, every
    token's embedding carries a gradient all the same. logits: the head is applied to all tokens, for nothing.
    mask: "pathway", where queries and VAE tokens see each other both ways as ours do, so that it is the same
    function; or the VLM's own, "causal".
    """

    trained: bool = True
    checkpointing: bool = True
    logits: bool = True
    mask: Mask = "pathway"


class NaiveModel(nn.Module):
    """What `FlowMatchingLoss` asks of a model. Takes the parts of `model`, without its pathway."""

    def __init__(self, model: WeMMU):
        super().__init__()
        self.vlm, self.vae, self.dit = model.vlm, model.vae, model.dit
        self.queries, self.vae_branch = model.bridge.queries, model.bridge.vae_branch
        self.position_mlp = model.bridge.position_mlp
        self.input_latents, self.target_latents = model.input_latents, model.target_latents
        # FrozenVLM keeps its VLM from it; but Hugging Face recomputes layers in training alone.
        self.vlm.vlm.train()
        self.way = Way()

    def go(self, way: Way, trains_dit: bool) -> None:
        """From now on step in this way."""
        self.way = way
        self.requires_grad_(False)
        for part in (self.vae_branch, self.position_mlp):
            assert part is not None
            part.requires_grad_(True)
        self.dit.requires_grad_(trains_dit)
        self.vlm.language_model.layers.requires_grad_(way.trained)
        self.vlm.language_model.norm.requires_grad_(way.trained)
        if way.checkpointing:
            self.vlm.vlm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.dit.enable_gradient_checkpointing()
        else:
            self.vlm.vlm.gradient_checkpointing_disable()
            self.dit.disable_gradient_checkpointing()

    def condition(
        self,
        prompts: Prompts,
        images: Tensor,
        size: tuple[int, int],
        noise: Noise,
        stored: Tensor | None = None,
        *_: object,
    ) -> Condition:
        rows, columns = token_grid(*size, self.vlm.token_px)
        embeds, image_positions = self._prompt(prompts, images)
        queries = self.queries(rows, columns, noise).to(embeds.dtype)
        assert self.vae_branch is not None
        tokens = torch.cat([embeds, self.vae_branch(self.input_latents(images, stored)), queries], dim=1)
        of_queries = image_grid_positions(prompts.next_position, rows, columns)
        states = self.vlm.vlm.model(
            inputs_embeds=tokens,
            attention_mask={"full_attention": self._mask(prompts.mask, tokens.shape[1])},
            position_ids=torch.cat([prompts.positions, image_positions, of_queries], dim=-1),
            use_cache=False,
        ).last_hidden_state
        if self.way.logits:
            self.vlm.vlm.lm_head(states)
        return Condition(self.position_mlp(states[:, -rows * columns :, None], rows, columns))

    def _prompt(self, prompts: Prompts, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [B, L, D] of the prompts with their images, and the images' positions [3, B, N * h * w]."""
        at_images = prompts.input_ids == self.vlm.image_token_id
        with torch.no_grad():
            embeds = self.vlm.language_model.embed_tokens(prompts.input_ids)
            if images.shape[1]:
                vision = self.vlm.vision(images.flatten(0, 1))
                embeds = embeds.masked_scatter(at_images[..., None], vision.to(embeds.dtype))
        return embeds.requires_grad_(), prompts.positions[:, at_images].reshape(3, len(embeds), -1)

    def _mask(self, prompt: Tensor, tokens: int) -> Tensor:
        """bool [B, 1, T, T], True where a token (row) may look: at real tokens, by the mask."""
        (b, length), device = prompt.shape, prompt.device
        real = torch.cat([prompt, prompt.new_ones(b, tokens - length)], dim=1)
        ordered = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
        if self.way.mask == "pathway":
            ordered[length:, length:] = True
        # A token of padding sees at least itself: a row without any would be NaN.
        alone = torch.eye(tokens, dtype=torch.bool, device=device)
        return (ordered & real[:, None, :] | alone)[:, None]

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return ADAPTER.velocity(self.dit, x_t.to(condition.states.dtype), t, condition.states).to(x_t.dtype)
