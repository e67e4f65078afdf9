"""The fixtures `model` and `encoder` of the miniature, and `here`."""

import pytest

from tests.models.fixtures import encoder, model
from tests.planning.worlds import in_this_process
from wemmu.measuring.__main__ import measure
from wemmu.planning import ask

__all__ = ["encoder", "here", "model"]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans measure in this process, which has torch anyway, and not in a child."""
    monkeypatch.setattr(ask, "_child", in_this_process(measure))
