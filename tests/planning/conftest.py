"""The fixture `here`."""

import pytest

from tests.planning.worlds import in_this_process
from wemmu.measuring.__main__ import measure
from wemmu.planning import ask


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans measure in this process, which has torch anyway, and not in a child."""
    monkeypatch.setattr(ask, "_child", in_this_process(measure))
