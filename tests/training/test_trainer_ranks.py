"""A run on several ranks that is killed, stopped or moved to another layout is the run that was never disturbed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.checkpoints import load_weights
from tests.training.runs import make_run
from wemmu.checkpoint import store
from wemmu.checkpoint.manifest import read_manifest
from wemmu.config import dump
from wemmu.config.schema import Backbones, Parallel
from wemmu.jsonlines import read_lines

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 400
ZERO3, HYBRID, SINGLE = Parallel(engine="zero3", ranks=2), Parallel(engine="hybrid", ranks=2, pp=2), Parallel()


def run(folder: Path, backbones: Backbones, shards: Path, layout: Parallel, kill_at: int | None = None) -> str:
    """Train to the end, or until the checkpoint of step `kill_at` is there and all ranks are killed; what was said."""
    folder.mkdir(exist_ok=True)
    logging = {"every": 1, "checkpoint_every": 2, "samples_every": 3, "wandb": "disabled", "keep_checkpoints": 9}
    sampling = {"steps": 1, "prompts": [{"text": "a red circle"}]}
    dump(make_run(backbones, shards, parallel=layout, logging=logging, sampling=sampling), folder / "config.yaml")
    command = [sys.executable, "-m", "wemmu.train", str(folder / "config.yaml")]
    if layout.ranks > 1:
        command = [sys.executable, "-m", "launcher.ranks", str(layout.ranks), *command]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        if kill_at is not None:
            awaited = folder / "checkpoints" / store.directory_name(kill_at)
            while not awaited.exists() and process.poll() is None:
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate(timeout=PATIENCE_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == (0 if kill_at is None else -signal.SIGKILL), said
    return said


def ended(folder: Path) -> tuple[dict[str, Tensor], list[tuple[int, float, float]]]:
    """Final weights, and step, loss and norm of every line of the record."""
    lines = [line for line in read_lines(folder / "metrics.jsonl") if "loss" in line]
    weights, _ = load_weights(folder / "checkpoints" / store.directory_name(8))
    return weights, [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


@pytest.fixture(scope="module")
def straight(backbones: Backbones, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for layout in (SINGLE, ZERO3, HYBRID):
        folders[layout.engine] = tmp_path_factory.mktemp("straight") / layout.engine
        run(folders[layout.engine], backbones, shards, layout)
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("layout", [ZERO3, HYBRID], ids=lambda layout: layout.engine)
def test_all_ranks_killed_and_started_again_end_bit_for_bit_alike(
    straight: dict[str, Path], backbones: Backbones, shards: Path, tmp_path: Path, layout: Parallel
):
    run(tmp_path / "run", backbones, shards, layout, kill_at=2)
    assert "going on from step_0000000" in run(tmp_path / "run", backbones, shards, layout)
    (ours, told), (theirs, expected) = ended(tmp_path / "run"), ended(straight[layout.engine])
    assert told == expected
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.slow
def test_a_run_that_moves_from_layout_to_layout_is_the_single_run(
    straight: dict[str, Path], backbones: Backbones, shards: Path, tmp_path: Path
):
    folder = tmp_path / "run"
    run(folder, backbones, shards, ZERO3, kill_at=2)
    newest = max(int(d.name[-8:]) for d in (folder / "checkpoints").glob("step_" + "[0-9]" * 8))
    run(folder, backbones, shards, HYBRID, kill_at=newest + 2)
    run(folder, backbones, shards, SINGLE)
    engines = [read_manifest(d).layout["engine"] for d in sorted((folder / "checkpoints").glob("step_*"))]
    assert engines[0] == "zero3"
    assert engines[-1] == "single"
    (ours, told), (theirs, expected) = ended(folder), ended(straight["single"])
    for (step, *values), (_, *reference) in zip(told, expected, strict=True):
        assert values == pytest.approx(reference, rel=1e-3), f"step {step}"
    for name, weight in theirs.items():
        if not name.endswith("attn2.to_k.bias"):  # of no effect, and its gradient is rounding
            torch.testing.assert_close(ours[name], weight, rtol=1e-2, atol=1e-4)


@pytest.mark.slow
def test_every_layout_leaves_the_same_record(straight: dict[str, Path]):
    _, expected = ended(straight["single"])
    for engine in ("zero3", "hybrid"):
        _, told = ended(straight[engine])
        assert [line[0] for line in told] == [line[0] for line in expected] == list(range(1, 9))
        for ours, theirs in zip(told, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3)
        assert [f.name for f in sorted((straight[engine] / "samples").iterdir())] == [
            "step_00000003.png", "step_00000006.png", "step_00000008.png",
        ]  # fmt: skip
