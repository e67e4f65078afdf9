"""A run of the miniature by the launcher: killed, resumed, compared with one that nobody disturbed; then used."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO

import torch

from benchmarks.gpu.engines import CASES, outcome
from benchmarks.gpu.verdict import Row, Setting, tail, tried, within
from benchmarks.measure import ROOT
from wemmu.checkpoint.store import MOMENTS, WEIGHTS
from wemmu.checkpoint.stored import StoredTensors
from wemmu.config import dump, load_curriculum, load_stage
from wemmu.config.checkpoints import MANIFEST, directory_name
from wemmu.config.schema import Curriculum
from wemmu.config.stage import Stage

SOURCE = ROOT / "configs" / "shapes" / "curriculum.yaml"
RECORDS = {"t2i": 1500, "reconstruction": 600, "unconditional": 100, "edit": 1500, "multi_edit": 10}
PROMPT = "a red circle at the top left and a blue square at the bottom right"
# The launcher measures the model first, which on two busy cores takes minutes.
PATIENCE_S = 900.0


def curriculum(folder: Path, steps: int) -> Curriculum:
    """Stages 1 and 3 of the miniature, half of the steps each, with a checkpoint halfway through both."""
    half, samples = steps // 2, json.dumps(RECORDS)
    words = {
        "data.shards": folder / "data",
        "data.prepare.sources.0.samples": samples,
        "logging.every": max(1, half // 10),
        "logging.samples_every": half,
        "logging.checkpoint_every": half // 2,
        "logging.wandb": "disabled",
        "evaluation.prompts": 0,
        "stages.*.steps": half,
        "stages.*.optimizer.warmup": 1,
        "stages.*.optimizer.decay": 1,
    }
    found = load_curriculum(SOURCE, [f"{name}={value}" for name, value in words.items()])
    return found.model_copy(update={"stages": (found.stages[0], found.stages[2])})


def miniature(setting: Setting) -> Iterator[Row]:
    """Rows of the run; a command that fails ends the part with its last lines."""
    folder, file = setting.scratch, setting.scratch / "curriculum.yaml"
    made = curriculum(folder, setting.steps)
    dump(made, file)
    where = {} if setting.real else {"CUDA_VISIBLE_DEVICES": ""}
    seconds = command(where, "data_pipeline", "write", file, "--workers", "0")
    yield Row("data", f"{sum(RECORDS.values())} records in {seconds:.0f} s")
    # The launcher would look at the data again, with Ray.
    dump(made.changed({"data.prepare": None}), file)
    first, whole = made.stages[0], ("launcher", "run", file, "--out", folder / "run")
    middle = folder / "run" / first.name / "checkpoints" / directory_name(first.steps // 2) / MANIFEST
    yield Row("killed", kill_at(middle, where, *whole))
    again = copied(folder / "run" / first.name, folder / "undisturbed" / first.name)
    # Most of the time is that of starting processes.
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(command, where, "wemmu.train", again / "config.yaml")
        yield Row("resumed, with the export", f"{command(where, *whole):.0f} s")
    yield from tried("speeds", speeds(folder / "run", made))
    yield from tried("export", exported(setting, where))
    yield from tried("undisturbed", undisturbed(setting, first, where, beside))


def exported(setting: Setting, where: dict[str, str]) -> Iterator[Row]:
    export, image = setting.scratch / "run" / "export", setting.scratch / "image.png"
    drawn = json.loads((export / "parity.json").read_text(encoding="utf-8"))["outputs"]
    yield within("export: images against the checkpoint's", drawn["max_abs_difference"], drawn["bound"])
    options = ("--prompt", PROMPT, "--count", "4", "--device", setting.device, "--out", image)
    text = f"4 images, {command(where, 'wemmu.sample', export, *options):.0f} s with the imports"
    yield Row("sampling from the export", text, "ok" if image.exists() else "off")


def undisturbed(setting: Setting, stage: Stage, where: dict[str, str], beside: Future[float]) -> Iterator[Row]:
    """The stage that was killed and resumed against one that was not; if they differ, what makes them equal.

    beside: the seconds of the one that was not.
    """
    resumed, last = setting.scratch / "run" / stage.name, Path("checkpoints") / directory_name(stage.steps)
    yield Row("undisturbed", f"{beside.result():.0f} s")
    differ, worst = differing(resumed / last, setting.scratch / "undisturbed" / stage.name / last)
    text = f"{differ or 'no'} tensors differ, by {worst:.1e} at most"
    yield Row("resumed and undisturbed", text, "told" if differ else "ok")
    if differ:
        yield from (Row("not deterministic", name) for name in not_deterministic(setting.device))
        yield repeated(resumed, setting.scratch / "deterministic", where)


def start(where: dict[str, str], log: IO[bytes], words: Sequence[object]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | where, stdout=log, stderr=subprocess.STDOUT)


def command(where: dict[str, str], *words: object) -> float:
    """Run `python -m WORDS`; seconds.

    Raises:
        RuntimeError: if it fails, with its last lines.
    """
    begun = time.monotonic()
    with NamedTemporaryFile() as log:
        if code := start(where, log.file, words).wait():
            raise RuntimeError(f"{' '.join(map(str, words))} ended with {code}: {tail(Path(log.name))}")
    return time.monotonic() - begun


def kill_at(file: Path, where: dict[str, str], *words: object) -> str:
    """Start the launcher, and kill it and its trainer as soon as `file` is there; return where the trainer was."""
    run, until = file.parents[3], time.monotonic() + PATIENCE_S
    with NamedTemporaryFile() as log:
        process = start(where, log.file, words)
        while not file.exists() and time.monotonic() < until and process.poll() is None:
            time.sleep(0.02)
        if not file.exists():
            last = tail(Path(log.name))
            raise RuntimeError(f"the launcher ended with {process.poll()} before {file} was there: {last}")
    # The group of the trainer first: the launcher's end is a signal upon which it would save.
    events = map(json.loads, (run / "ledger.jsonl").read_text(encoding="utf-8").splitlines())
    trainer = [event["pid"] for event in events if event["event"] == "started"][-1]
    os.killpg(trainer, signal.SIGKILL)
    process.kill()
    process.wait()
    lines = (file.parents[2] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return f"at step {max((json.loads(line)['step'] for line in lines), default=0)} or later, after {file.parent.name}"


def copied(stage: Path, to: Path, deterministic: bool = False) -> Path:
    """A folder of the same stage in which nothing has run."""
    to.mkdir(parents=True)
    run = load_stage(stage / "config.yaml")
    dump(run.changed({"kernels.deterministic": deterministic}), to / "config.yaml")
    return to


def repeated(stage: Path, folder: Path, where: dict[str, str]) -> Row:
    """Whether two runs of a stage are equal with `kernels.deterministic`."""
    runs = [copied(stage, folder / name / stage.name, deterministic=True) for name in ("first", "second")]
    with ThreadPoolExecutor(len(runs)) as pool:
        list(pool.map(lambda run: command(where, "wemmu.train", run / "config.yaml"), runs))
    last = Path("checkpoints") / directory_name(load_stage(stage / "config.yaml").stage.steps)
    differ, worst = differing(*(run / last for run in runs))
    text = f"{differ or 'no'} tensors differ, by {worst:.1e} at most"
    return Row("two runs with kernels.deterministic=true", text, "off" if differ else "ok")


def differing(one: Path, other: Path) -> tuple[int, float]:
    """How many tensors of two checkpoints differ, weights and moments, and by how much of their norm at most."""
    stored, worst, count = [StoredTensors(path) for path in (one, other)], 0.0, 0
    manifest = stored[0].manifest
    parts = {WEIGHTS: list(manifest.tensors), **dict.fromkeys(MOMENTS, manifest.trained)}
    for part, names in parts.items():
        for name in names:
            a, b = (each.read(name, part) for each in stored)
            if not torch.equal(a, b):
                count, worst = count + 1, max(worst, float((a - b).norm() / b.norm()))
    return count, worst


def not_deterministic(device: str) -> list[str]:
    """What torch calls not deterministic in a step of each recipe."""
    found: set[str] = set()
    torch.use_deterministic_algorithms(True, warn_only=True)
    for case in CASES.values():
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            outcome(case, torch.device(device))
        found |= {str(one.message).split(" does not have")[0] for one in told if "determin" in str(one.message)}
    return sorted(found)


def speeds(run: Path, made: Curriculum) -> Iterator[Row]:
    """Loss at both ends and the shortest time for a step of each stage, by its own record."""
    for stage in made.stages:
        lines = map(json.loads, (run / stage.name / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        logged = [line for line in lines if "loss" in line]
        finite = all(math.isfinite(line["loss"]) for line in logged)
        text = f"from {logged[0]['loss']:.3g} to {logged[-1]['loss']:.3g}"
        yield Row(f"{stage.name}: loss", text, "ok" if finite else "off")
        shortest = min(
            (b["time"] - a["time"]) / (b["step"] - a["step"]) for a, b in pairwise(logged) if b["step"] > a["step"]
        )
        yield Row(f"{stage.name}: a step, beside other parts", f"{1000 * shortest:.0f} ms")
