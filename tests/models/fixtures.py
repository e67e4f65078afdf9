"""The fixtures `model` and `encoder`, apart from what benchmarks take from `world`, which need no pytest."""

import pytest

from tests.models.world import make_model
from wemmu.config.schema import Backbones
from wemmu.prompts import PromptEncoder
from wemmu.recipes.wemmu.model import WeMMU


@pytest.fixture(scope="session")
def model(backbones: Backbones) -> WeMMU:
    """The model, for tests that do not change it."""
    return make_model(backbones)


@pytest.fixture(scope="session")
def encoder(backbones: Backbones) -> PromptEncoder:
    return PromptEncoder(backbones.vlm)
