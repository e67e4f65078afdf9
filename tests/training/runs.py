"""Small stages for tests of the training room."""

from pathlib import Path

from wemmu.checkpoint.retention import latest
from wemmu.config import dump, load_stage
from wemmu.config.schema import Backbones, Curriculum, StageRun
from wemmu.recipes.wemmu.config import Bridge, WeMMU

STAGE = {
    "name": "stage",
    "resolution": 32,
    "steps": 8,
    "global_batch": 4,
    "trains": ["vae_branch", "pathway", "position_mlp", "dit"],
    "optimizer": {"lr": 1e-3, "module_lr": {"dit": 1e-4}, "weight_decay": 0.01, "warmup": 2, "decay": 2},
    "mixture": {"t2i": 0.5, "edit": 0.5},
}


def make_run(backbones: Backbones, shards: Path, **changes: object) -> StageRun:
    """The config of a stage of a few tiny steps."""
    curriculum = Curriculum.model_validate(
        {
            "name": "tiny",
            "backbones": backbones,
            "recipe": WeMMU(bridge=Bridge(position_table=8)),
            "data": {"shards": shards},
            # Two micro-batches a step; features are remembered, so runs that remember others must still be equal.
            "memory": {"micro_batch": 2, "reference_resolution": 32, "cached_images": 12},
            "logging": {"every": 1, "checkpoint_every": 2, "samples_every": 3, "wandb": "disabled"},
            "threads": 1,
            "stages": [STAGE],
            **changes,
        }
    )
    return curriculum.stage_run("stage")


STAGE_RUN = make_run(Backbones(vlm=Path("vlm"), sana=Path("sana")), Path("shards"))


def train(run: StageRun, folder: Path) -> Path:
    """Train the stage in a folder to its end; the newest checkpoint."""
    # Slow to import, and most who import this module train by themselves.
    from wemmu.training.trainer import Trainer

    folder.mkdir(exist_ok=True)
    dump(run, folder / "config.yaml")
    assert Trainer(load_stage(folder / "config.yaml"), folder).train() == 0
    newest = latest(folder / "checkpoints")
    assert newest is not None
    return newest
