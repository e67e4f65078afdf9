"""The fixtures `model` and `encoder`, and the signals of pytest."""

import signal
from collections.abc import Iterator

import pytest

from tests.models.fixtures import encoder, model

__all__ = ["encoder", "model"]


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """A trainer takes over the signals of its process; give pytest's back."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
