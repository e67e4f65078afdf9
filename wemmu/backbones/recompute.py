"""Activation checkpointing: a layer's insides are computed again in the backward pass instead of being kept for it."""

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def recomputed(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`layer(*args, **kwargs)`, of which only the inputs and outputs are kept. No layer here draws random numbers."""
    # A recomputation goes to the layer's end, although less would do: the hooks of sharded engines release the weights
    # of a module when it is left.
    return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False, early_stop=False, **kwargs)
