"""A run that learns from rewards, killed in the middle of a rollout, is the run that was never disturbed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.data.handmade import PX, all_tasks, write
from tests.training.test_uae import CONFIG, FEW
from wemmu.checkpoint import retention, store
from wemmu.checkpoint.manifest import read_manifest
from wemmu.config import StageRun, dump, load_curriculum, load_stage
from wemmu.config.task import Task
from wemmu.training.trainer import Trainer

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 300
# Two steps of each rollout: checkpoints are due after each step and possible after every second one.
SMALL = (
    *FEW,
    "memory={micro_batch: 4, reference_resolution: 32}",
    "logging={every: 1, samples_every: 100, checkpoint_every: 1, keep_checkpoints: 9, wandb: disabled}",
    "stages.reward.objective={kind: unified_grpo, group: 2, temperature: 2.0, updates: 2, beta: 0.01}",
    f"stages.reward.resolution={PX}",
    "stages.reward.steps=6",
    "stages.reward.global_batch=4",
    "stages.reward.optimizer.warmup=0",
    "sampling.prompts=[]",
    "threads=1",
)


def run_of(root: Path) -> StageRun:
    """The caption task is served by text-to-image records, whose captions it does not see."""
    write(root / "shards", all_tasks({Task.T2I: 8}))
    overrides = [*SMALL, f"data={{shards: {root / 'shards'}}}"]
    return load_curriculum(CONFIG, overrides).stage_run("reward")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = retention.latest(folder / "checkpoints")
    assert newest is not None
    found = {name: torch.empty(shape) for name, shape in read_manifest(newest).tensors.items()}
    store.fill_weights(newest, read_manifest(newest), found)
    return found


def recorded(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.slow
def test_a_killed_run_is_the_undisturbed_one(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        dump(run, folder / "config.yaml")
    assert Trainer(load_stage(whole / "config.yaml"), whole).train() == 0
    lines = recorded(whole)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    known = {"reward", "kl", "entropy", "length/min", "length/max", "time/rollout_s", "time/reward_s", "time/update_s"}
    assert known < lines[0].keys()
    assert sorted(d.name for d in (whole / "checkpoints").iterdir()) == [store.directory_name(n) for n in (2, 4, 6)]

    command = [sys.executable, "-m", "wemmu.train", str(killed / "config.yaml")]
    process = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + PATIENCE_S
    while not (recorded(killed) and (killed / "checkpoints" / store.directory_name(2)).exists()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    newest = retention.latest(killed / "checkpoints")
    assert newest is not None
    assert newest.name < store.directory_name(6), "it was killed too late"
    assert Trainer(load_stage(killed / "config.yaml"), killed).train() == 0
    ours, theirs = weights(killed), weights(whole)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert ours.keys() == theirs.keys()
    rewards = [[line["reward"] for line in recorded(folder)][-2:] for folder in (killed, whole)]
    assert rewards[0] == rewards[1]
