"""The diffusion transformer as a velocity field, whole or as a chain of stages."""

from diffusers import SanaTransformer2DModel
from torch import Tensor, nn

from wemmu.types import Condition

# Sana counts time from 0 to 1000.
TIME_SCALE = 1000.0

# What goes from stage to stage: image tokens [B, h * w, D], projected condition [B, Q, D], the modulation of every
# block [B, 6 D] and the embedding of the time [B, D].
Activations = tuple[Tensor, Tensor, Tensor, Tensor]


def velocity(dit: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """v_theta(x_t, t, y): x_t [B, C, h, w], t [B] in [0, 1] with 1 = noise -> [B, C, h, w].

    It is computed in the type of the condition and returned in that of x_t: a path lives in float32.
    """
    states = condition.states
    v = dit(x_t.to(states.dtype), encoder_hidden_states=states, timestep=t * TIME_SCALE, return_dict=False)[0]
    return v.to(x_t.dtype)


class DiTStage(nn.Module):
    """Successive blocks of a Sana, of a chain of `stages`; the first embeds, the last makes the velocity.

    The chain computes what the whole `dit` does. This stage takes its modules out of `dit`, which is left with them
    alone; `canonical` gives the names that its parameters have in the whole.
    """

    def __init__(self, dit: SanaTransformer2DModel, stage: int, stages: int):
        """Raises ValueError if there are more stages than blocks."""
        super().__init__()
        blocks = len(dit.transformer_blocks)
        if stages > blocks:
            raise ValueError(f"{stages} stages cannot share the {blocks} blocks of the DiT; valid: 1 to {blocks}")
        self.is_first, self.is_last = stage == 0, stage == stages - 1
        self.begin = blocks * stage // stages
        dit.transformer_blocks = dit.transformer_blocks[self.begin : blocks * (stage + 1) // stages]
        if not self.is_first:
            dit.patch_embed = dit.time_embed = dit.caption_projection = dit.caption_norm = None
        if not self.is_last:
            dit.norm_out = dit.proj_out = dit.scale_shift_table = None
        self.dit = dit

    def canonical(self, name: str) -> str:
        """The name in the whole DiT of the parameter that is `name` here."""
        parts = name.removeprefix("dit.").split(".")
        if parts[0] == "transformer_blocks":
            parts[1] = str(int(parts[1]) + self.begin)
        return ".".join(parts)

    def forward(
        self, inputs: Activations | tuple[Tensor, Tensor, Tensor], grid: tuple[int, int]
    ) -> Activations | Tensor:
        """One stage's way.

        inputs: of the first stage x_t [B, C, h, w], t [B] and the condition's states [B, Q, caption channels]; of
        others what the stage before returned. grid: (rows, columns) of image tokens. Returns v_theta in float32
        [B, C, h, w] from the last stage.
        """
        h, condition, modulation, time = self._embed(*inputs) if self.is_first else inputs
        for block in self.dit.transformer_blocks:
            arguments = (h, None, condition, None, modulation, *grid)
            if self.dit.gradient_checkpointing and h.requires_grad:
                h = self.dit._gradient_checkpointing_func(block, *arguments)
            else:
                h = block(*arguments)
        return self._velocity(h, time, grid) if self.is_last else (h, condition, modulation, time)

    def _embed(self, x_t: Tensor, t: Tensor, states: Tensor) -> Activations:
        dit = self.dit
        h = dit.patch_embed(x_t.to(states.dtype))
        modulation, time = dit.time_embed(t * TIME_SCALE, batch_size=len(h), hidden_dtype=h.dtype)
        return h, dit.caption_norm(dit.caption_projection(states)), modulation, time

    def _velocity(self, h: Tensor, time: Tensor, grid: tuple[int, int]) -> Tensor:
        dit, p = self.dit, self.dit.config.patch_size
        patches = dit.proj_out(dit.norm_out(h, time, dit.scale_shift_table))
        patches = patches.unflatten(1, grid).unflatten(-1, (p, p, -1))  # [B, rows, columns, p, p, C]
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3).float()
