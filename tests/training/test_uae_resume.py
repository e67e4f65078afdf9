"""A run that learns from rewards, killed in the middle of a rollout, is the run that was never disturbed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.checkpoints import differing, load_weights
from tests.data.handmade import PX, all_tasks, write
from tests.training.runs import train
from tests.training.test_uae import CONFIG, FEW
from tools.convert_ckpt import export, find
from wemmu.checkpoint import retention, store
from wemmu.config import StageRun, dump, load_curriculum
from wemmu.config.task import Task
from wemmu.jsonlines import read_lines
from wemmu.pipeline import WeMMUPipeline

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 300
# Two steps of each rollout: checkpoints are due after each step and possible after every second one.
SMALL = (
    *FEW,
    "memory={micro_batch: 4, reference_resolution: 32}",
    "logging={every: 1, samples_every: 100, checkpoint_every: 1, keep_checkpoints: 9, wandb: disabled}",
    f"stages.reward.resolution={PX}",
    "stages.reward.steps=6",
    "stages.reward.global_batch=4",
    "stages.reward.optimizer.warmup=0",
    "sampling.prompts=[]",
    "threads=1",
)


SHARED = "group: 2, temperature: 2.0, updates: 2, beta: 0.01"
# What learns -> its objective, and what is recorded of it alone.
LEARNS = {
    "llm": (f"{{kind: unified_grpo, {SHARED}}}", {"entropy", "length/min", "length/max"}),
    "dit": (f"{{kind: flow_grpo, window: 1, first: 0, {SHARED}}}", {"ratio", "time/caption_s"}),
}


def run_of(root: Path, learns: str) -> StageRun:
    """The caption task is served by text-to-image records, whose captions it does not see."""
    write(root / "shards", all_tasks({Task.T2I: 8}))
    own = [f"stages.reward.trains=[{learns}]", f"stages.reward.objective={LEARNS[learns][0]}"]
    overrides = [*SMALL, *own, f"data={{shards: {root / 'shards'}}}"]
    return load_curriculum(CONFIG, overrides).stage_run("reward")


def recorded(folder: Path) -> list[dict]:
    return read_lines(folder / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("learns", LEARNS)
def test_a_killed_run_is_the_undisturbed_one(tmp_path: Path, learns: str) -> None:
    run = run_of(tmp_path, learns)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    last = train(run, whole)
    killed.mkdir()
    dump(run, killed / "config.yaml")
    lines = recorded(whole)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    known = {"reward", "kl", "clipped_low", "time/rollout_s", "time/reward_s", "time/update_s"}
    assert known | LEARNS[learns][1] < lines[0].keys()
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
    theirs, _ = load_weights(last)
    assert differing(load_weights(train(run, killed))[0], theirs) == []
    if learns == "dit":
        # Both models draw; the export is refused where they differ.
        said = export(find(last), tmp_path / "out", "float32", False, True)
        assert any("max abs difference" in line for line in said)
        assert WeMMUPipeline.from_pretrained(tmp_path / "out").config["resolution"] == PX
        exported = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
        assert differing({f"generator.dit.{name}": w for name, w in exported.items()}, theirs) == []
    rewards = [[line["reward"] for line in recorded(folder)][-2:] for folder in (killed, whole)]
    assert rewards[0] == rewards[1]
