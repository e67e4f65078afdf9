"""The one convention of time: t = 1 is noise, t = 0 is data; training and sampling shift it alike."""

from collections.abc import Callable

from torch import Tensor

# v(x_t [B, ...], t [B]) -> [B, ...]; the condition is bound inside.
VelocityField = Callable[[Tensor, Tensor], Tensor]


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t <- s t / (1 + (s - 1) t): moves weight towards noise for s > 1; 0 and 1 stay."""
    return shift * t / (1 + (shift - 1) * t)
