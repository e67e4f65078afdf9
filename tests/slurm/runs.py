"""Tiny curricula for real jobs, and what became of them."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from launcher.ledger import Event, Ledger
from tests.checkpoints import load_weights
from tests.training.runs import STAGE
from wemmu.checkpoint import store
from wemmu.config import Curriculum, dump, load_curriculum
from wemmu.config.schema import Backbones

REPOSITORY = Path(__file__).parents[2]
STEPS = 20


@dataclass(frozen=True)
class World:
    """What all runs of a test session share, and the folder in which they lie."""

    backbones: Backbones
    shards: Path
    folder: Path

    def curriculum(self, name: str, **changes: object) -> Path:
        """The file of a curriculum of two stages; `changes` of its fields."""
        stages = [STAGE | {"name": stage, "steps": STEPS} for stage in ("stage1", "stage2")]
        made = Curriculum.model_validate(
            {
                "name": name,
                "backbones": self.backbones,
                "recipe": {"kind": "wemmu", "bridge": {"position_table": 8}},
                "data": {"shards": self.shards},
                "memory": {"micro_batch": 2, "reference_resolution": 32},
                "logging": {"every": 4, "checkpoint_every": 4, "samples_every": STEPS, "wandb": "disabled"},
                "sampling": {"steps": 1, "prompts": [{"text": "a red circle"}]},
                "threads": 1,
                "stages": stages,
                **changes,
            }
        )
        file = self.folder / f"{name}.yaml"
        dump(made, file)
        return file


def launcher(*arguments: object, code: int = 0) -> str:
    """What `python -m launcher` prints; the test fails if it ends with another exit code."""
    command = [sys.executable, "-m", "launcher", *map(str, arguments)]
    # Wide, so that no sentence of a table is broken.
    wide = os.environ | {"COLUMNS": "250"}
    done = subprocess.run(command, cwd=REPOSITORY, env=wide, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def train_here(curriculum: Path, run: Path, stages: Sequence[str]) -> None:
    """Train stages on this machine without Slurm and undisturbed, in a folder as the launcher makes it."""
    from launcher import folder

    config = load_curriculum(curriculum)
    run.mkdir()
    folder.write(config, run)
    for stage in stages:
        ranks = [sys.executable, "-m", "launcher.ranks", str(config.parallel.ranks)]
        train = [sys.executable, "-m", "wemmu.train", str(run / stage / "config.yaml")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*ranks, *train], cwd=REPOSITORY, env=environment, check=True, timeout=900)


def weights(run: Path, stage: str, steps: int = STEPS) -> dict[str, Tensor]:
    """What a stage ended with."""
    return load_weights(run / stage / "checkpoints" / store.directory_name(steps))[0]


def assert_equal_weights(run: Path, other: Path, stage: str, steps: int = STEPS) -> None:
    ours, theirs = weights(run, stage, steps), weights(other, stage, steps)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def story(run: Path, job: str) -> list[Event]:
    """What the ledger tells of a job, without the warnings that may or may not come before an end."""
    return [event for event in Ledger(run / "ledger.jsonl").of(job) if event.event != "warned"]


def saved_at_least(run: Path, stage: str, step: int) -> Callable[[], bool]:
    """Whether there is a checkpoint of `step` or a later one."""
    wanted = (run / stage / "checkpoints").glob

    def there() -> bool:
        return any(int(d.name[-8:]) >= step for d in wanted("step_" + "[0-9]" * 8))

    return there


def rank_processes(run: Path) -> dict[int, int]:
    """Rank -> process id of the ranks that train in a run folder now."""
    found: dict[int, int] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            entries = (process / "environ").read_text(errors="replace").split("\0")
        except OSError:
            continue
        if "wemmu.train" in command and any(str(run) in word for word in command) and "launcher.ranks" not in command:
            rank = next(entry for entry in entries if entry.startswith("RANK="))
            found[int(rank.removeprefix("RANK="))] = int(process.name)
    return found


@contextmanager
def paused(run: Path) -> Iterator[dict[int, int]]:
    """The ranks of a run stand still, so that a test is not in a race with them; yields their process ids."""
    ranks = rank_processes(run)
    for process in ranks.values():
        os.kill(process, signal.SIGSTOP)
    try:
        yield ranks
    finally:
        for process in ranks.values():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)
