"""Backbones with fewer layers: what is proved of two holds for twenty, and every rank loads them anew."""

import pytest

from tests.models.on_disk import make_backbones
from wemmu.config.schema import Backbones


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Backbones:
    # Three, so that two stages are of different length.
    return make_backbones(tmp_path_factory.mktemp("small"), layers=3)
