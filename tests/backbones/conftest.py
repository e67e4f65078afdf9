"""The fixtures `model` and `encoder`."""

from tests.models.fixtures import encoder

__all__ = ["encoder"]
