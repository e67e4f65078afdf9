"""Shared fixtures: tiny backbones with random weights, in the real classes and the published layout."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from tests.measuring import in_forks
from tests.models.on_disk import make_backbones
from tests.models.world import make_model
from wemmu.config.schema import Backbones
from wemmu.planning import ask
from wemmu.prompts import PromptEncoder
from wemmu.recipes.wemmu.model import WeMMU

torch.set_num_threads(1)
# A developer's own key must not send the runs of tests anywhere.
os.environ["WANDB_MODE"] = "offline"
# What one test has measured of a model no other need measure again; the names are hashes of all that it depends on.
os.environ["WEMMU_CACHE"] = str(Path(__file__).parents[1] / ".pytest_cache" / "wemmu")


class ByFile(LoadScopeScheduling):
    """A file's tests go to one worker; those on Slurm to one together, since only one can use it at a time."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "tests/slurm" if file.startswith("tests/slurm/") else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those on Slurm first, which mostly wait, then files with slow tests: neither worker shall wait for them alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.get_closest_marker("slurm") is None, item.path not in slow))


@pytest.fixture(scope="session", autouse=True)
def quick_measuring() -> Iterator[None]:
    """What a test of this process measures of a model costs no new process that imports torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ask, "_child", in_forks)
        yield


@pytest.fixture(autouse=True)
def nothing_inherited() -> Iterator[None]:
    """Processes of later tests inherit no more blocked or ignored signals, and the same folder and umask."""
    ignored, before = _ignored(), _inherited()
    yield
    assert _inherited() == before
    # Less is right: a training takes the SIGINT that a shell has its background jobs ignore.
    assert _ignored() <= ignored


def _ignored() -> set[int]:
    return {number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN}


def _inherited() -> tuple[object, ...]:
    os.umask(umask := os.umask(0o022))
    return signal.pthread_sigmask(signal.SIG_BLOCK, ()), os.getcwd(), umask


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Backbones:
    """Directories that `load_backbones` takes: sizes of the miniature, weights at random (seeded)."""
    return make_backbones(tmp_path_factory.mktemp("backbones"))


@pytest.fixture
def copied(backbones: Backbones, tmp_path: Path) -> Backbones:
    """The backbones as `vlm` and `sana` of the test's folder, to be changed."""
    shutil.copytree(backbones.vlm, tmp_path / "vlm")
    shutil.copytree(backbones.vae.parent, tmp_path / "sana")
    return Backbones(vlm=tmp_path / "vlm", sana=tmp_path / "sana")


@pytest.fixture(scope="session")
def model(backbones: Backbones) -> WeMMU:
    """The model on these backbones, for tests that do not change it."""
    return make_model(backbones)


@pytest.fixture(scope="session")
def encoder(backbones: Backbones) -> PromptEncoder:
    return PromptEncoder(backbones.vlm)
