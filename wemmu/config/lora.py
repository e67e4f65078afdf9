"""Adapters of low rank (LoRA, arXiv 2106.09685), trained while the module's own weights are frozen."""

from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import Field

from wemmu.config.base import Config, Positive


class LoRA(Config):
    """A part learns W + (alpha / rank) B A in place of W: A [rank, in], B [out, rank]; W is frozen, and B begins at 0.

    targets: the linear layers that get an adapter, by the ends of their names (`q_proj`, `attn2.to_q`) or by wildcards
    (`layers.1?.self_attn.*`). Empty: every linear layer of the part's repeated blocks. alpha: rank if not given.
    """

    rank: Annotated[Positive, Field(le=2**16)] = 16
    alpha: Annotated[float, Field(gt=0)] | None = None
    targets: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """Return alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def matches(self, layer: str, target: str) -> bool:
        """Return whether `target` names the layer."""
        return fnmatchcase(layer, target) or fnmatchcase(layer, f"*.{target}")
