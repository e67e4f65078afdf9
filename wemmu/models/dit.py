"""The diffusion transformer as a velocity field."""

from diffusers import SanaTransformer2DModel
from torch import Tensor

from wemmu.types import Condition

# Sana counts time from 0 to 1000.
TIME_SCALE = 1000.0


def velocity(dit: SanaTransformer2DModel, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """v_theta(x_t, t, y): x_t [B, C, h, w], t [B] in [0, 1] with 1 = noise -> [B, C, h, w].

    It is computed in the type of the condition and returned in that of x_t: a path lives in float32.
    """
    states = condition.states
    v = dit(x_t.to(states.dtype), encoder_hidden_states=states, timestep=t * TIME_SCALE, return_dict=False)[0]
    return v.to(x_t.dtype)
