"""Activation checkpointing: recompute a layer in the backward pass instead of keeping its activations."""

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def recomputed(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call `layer(*args, **kwargs)` and keep only inputs and outputs. No layer here draws random numbers."""
    # Recompute to the layer's end, although less would do: hooks of sharded engines release a module's weights when it
    # returns.
    return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False, early_stop=False, **kwargs)
