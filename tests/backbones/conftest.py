"""The fixtures `model` and `encoder`."""

from tests.models.world import encoder

__all__ = ["encoder"]
