"""The fixtures `model` and `encoder` of the miniature, and `published`."""

import pytest

from tests.models.world import encoder, model
from tests.planning.worlds import write_published
from wemmu.config.schema import Backbones

__all__ = ["encoder", "model", "published"]


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Backbones:
    return write_published(tmp_path_factory.mktemp("published"))
