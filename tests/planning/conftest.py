"""The fixtures `model` and `encoder` of the miniature, and `here`."""

from functools import partial

import pytest

from tests.models.world import encoder, model
from wemmu.measuring.__main__ import measure
from wemmu.planning import ask, plan

__all__ = ["encoder", "here", "model"]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans measure in this process, which has torch anyway, and not in a child."""
    monkeypatch.setattr(plan, "ask", partial(ask.ask, measure=measure))
