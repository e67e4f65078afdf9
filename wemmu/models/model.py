"""All of WeMMU on one device: what is frozen, what can be trained, and the way from a prompt to a velocity."""

from collections.abc import Callable

from torch import Tensor, nn

from wemmu.config.stage import Module
from wemmu.models.bridge import Bridge
from wemmu.models.dit import DiTStage, velocity
from wemmu.models.recompute import recomputed
from wemmu.models.staged import Staged
from wemmu.models.vae import FrozenVAE
from wemmu.models.vlm import FrozenVLM
from wemmu.noise import Noise
from wemmu.positions import token_grid
from wemmu.types import Condition, Prompts


class WeMMU(Staged):
    """vlm and vae are never trained; bridge and dit are, by stages (`freeze_all_but`)."""

    # The parts that hold all that stages can train, which engines may shard.
    sharded = ("bridge", "dit")

    def __init__(self, vlm: FrozenVLM, vae: FrozenVAE, bridge: Bridge, dit: nn.Module):
        super().__init__()
        self.vlm, self.vae, self.bridge, self.dit = vlm, vae, bridge, dit
        # (x_t, t, states) -> velocity, where the DiT is not here as a whole (`stage_of_dit`).
        self.velocity_elsewhere: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def condition(
        self, prompts: Prompts, images: Tensor, size: tuple[int, int], noise: Noise, stored: Tensor | None = None
    ) -> Condition:
        """Condition of the DiT for pictures of `size` = (height, width) px.

        images: uint8 [B, N, 3, H, W], the input pictures of each prompt; stored: their latents, see `input_latents`.
        """
        prefix = self.vlm.prefix(prompts, images)
        return self.bridge(prefix, self.input_latents(images, stored), token_grid(*size, self.vlm.token_px), noise)

    def input_latents(self, images: Tensor, stored: Tensor | None = None) -> Tensor:
        """Latents [B, N, C, h, w] of the input pictures, on the grid of their VLM tokens.

        `stored` are latents of the pictures as they are, [B, N, C, H / latent px, W / latent px]. They are of use only
        where that is the same grid; at the published sizes (28 px tokens, 32 px latents) it is another.
        """
        b, n, _, height, width = images.shape
        if n == 0 or self.bridge.vae_branch is None:
            return images.new_zeros(b, 0, self.vae.latent_channels, 1, 1, dtype=self.vae.vae.dtype)
        grid = token_grid(height, width, self.vlm.token_px)
        if stored is not None and stored.shape[-2:] == grid:
            return stored.to(self.vae.vae.dtype)
        return self.vae.encode(images.flatten(0, 1), grid).unflatten(0, (b, n))

    def target_latents(self, target: Tensor, stored: Tensor | None = None) -> Tensor:
        """Latents [B, C, h, w] of the pictures to make, uint8 [B, 3, H, W]; `stored` ones need no encoding."""
        return self.vae.encode(target) if stored is None else stored.to(self.vae.vae.dtype)

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """v_theta(x_t, t, y) of the DiT; see `wemmu.models.dit.velocity`."""
        if self.velocity_elsewhere is not None:
            return self.velocity_elsewhere(x_t, t, condition.states)
        return velocity(self.dit, x_t, t, condition)

    def stage_of_dit(self, stage: int, stages: int) -> DiTStage:
        """Make the DiT one stage of a chain. What the others have is gone; who runs them gives `velocity_elsewhere`."""
        return DiTStage(self.dit, stage, stages)

    def modules_by_name(self) -> dict[Module, nn.Module]:
        """The parts that a stage can name in `trains`; parts this configuration lacks are left out."""
        parts: dict[Module, nn.Module | None] = {
            "vae_branch": self.bridge.vae_branch,
            "pathway": self.bridge.pathway,
            "position_mlp": self.bridge.position_mlp,
            "queries": self.bridge.queries,
            "dit": self.dit,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def checkpoint_activations(self) -> None:
        """Recompute each layer of the pathway and of the DiT in the backward pass instead of keeping what is inside."""
        self.bridge.pathway.checkpointing = True
        self.dit.enable_gradient_checkpointing(recomputed)
