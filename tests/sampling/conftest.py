"""The fixtures `model` and `encoder`."""

from tests.models.fixtures import encoder, model

__all__ = ["encoder", "model"]
