"""A run folder with a finished second stage of random weights, and its export."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers.utils import logging

from wemmu.checkpoint import store
from wemmu.checkpoint.manifest import Origin
from wemmu.checkpoint.state import TrainState
from wemmu.config import Curriculum, StageRun, dump, load_curriculum
from wemmu.config.schema import Backbones
from wemmu.pipeline import WeMMUPipeline
from wemmu.published.identity import identity
from wemmu.recipes.wemmu.build import build_model
from wemmu.recipes.wemmu.model import WeMMU

REPOSITORY = Path(__file__).resolve().parents[2]
OVERRIDES = (
    "recipe.bridge.position_table=8",
    "sampling.steps=3",
    "stages.*.steps=2",
    "stages.*.optimizer.warmup=0",
    "stages.*.optimizer.decay=0",
)

logging.disable_progress_bar()


@dataclass(frozen=True)
class Trained:
    """A run folder and, of its newest finished stage, the config, the checkpoint and the very weights in it."""

    folder: Path
    run: StageRun
    checkpoint: Path
    model: WeMMU


@pytest.fixture(scope="session")
def trained(backbones: Backbones, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """stage2 is finished; stage3 has begun: it left one checkpoint before its last step, with averages 1 off."""
    folder = tmp_path_factory.mktemp("run")
    paths = (f"backbones.vlm={backbones.vlm}", f"backbones.sana={backbones.vae.parent}")
    curriculum = load_curriculum(REPOSITORY / "configs/shapes/curriculum.yaml", (*paths, *OVERRIDES))
    _stage(curriculum, "stage3", folder, steps=1, seed=11, averages=True)
    return _stage(curriculum, "stage2", folder, steps=2, seed=10)


def _stage(curriculum: Curriculum, name: str, folder: Path, steps: int, seed: int, averages: bool = False) -> Trained:
    run = curriculum.stage_run(name)
    (folder / name).mkdir()
    dump(run, folder / name / "config.yaml")
    model, _ = build_model(run.backbones, run.recipe.bridge, seed)
    model.freeze_all_but(run.stage.trains)
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(seed)
    for weight in weights.values():
        weight += 0.02 * torch.randn(weight.shape, generator=generator)
    moments = {n: torch.zeros_like(w) for n, w in weights.items()}
    frozen = {"vlm": identity(run.backbones.vlm), "vae": identity(run.backbones.vae)}
    written = store.save(
        folder / name / "checkpoints",
        TrainState(weights, moments, moments, steps, {n: w + 1 for n, w in weights.items()} if averages else {}),
        {},
        Origin(name, run.seed, run.stage.resolution, frozen),
    )
    return Trained(folder, run, written, model.requires_grad_(False).eval())


@pytest.fixture(scope="session")
def exported(trained: Trained) -> Path:
    """What the launcher's own call makes of the run."""
    out = trained.folder / "export"
    python([REPOSITORY / "tools/convert_ckpt.py", trained.folder, "--out", out], trained.folder)
    return out


@pytest.fixture(scope="session")
def pipe(exported: Path) -> WeMMUPipeline:
    """The export, loaded once for tests that do not change it."""
    loaded = WeMMUPipeline.from_pretrained(exported)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def python(arguments: list, home: Path) -> str:
    """Run Python on one thread with a home of its own; returns what it printed, and fails with it."""
    mine = {"OMP_NUM_THREADS": "1", "HF_HOME": str(home / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | mine, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
