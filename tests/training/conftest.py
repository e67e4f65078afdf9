"""The fixtures `model` and `encoder`."""

from tests.models.world import encoder, model

__all__ = ["encoder", "model"]
