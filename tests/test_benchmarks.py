"""The benchmarks run; how fast anything is, no test says."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import ablation, step_variants
from benchmarks.gpu import step as of_gpu
from benchmarks.gpu import verdict
from benchmarks.gpu.__main__ import PARTS as PARTS_OF_GPU
from benchmarks.naive import Way
from benchmarks.step import PRELOADED as PRELOADED_FOR_STEPS
from benchmarks.step_sizes import SIZES
from data_pipeline.plan import plan as plan_of_data
from tests.parallel.ranks import PRELOADED as PRELOADED_FOR_RANKS
from wemmu.command_line import FINAL
from wemmu.config import load_curriculum

ROOT = Path(__file__).resolve().parents[1]
PARTS = {
    "speed": {"Writing": 2, "Reading a sample at 256 px": 11, "Reading a sample at 512 px": 11},
    "growth": {"Growing": 2},
    "feed": {"Feeding": 5},
}


@pytest.mark.slow
@pytest.mark.parametrize("what", PARTS)
def test_the_data_benchmark_has_every_row(tmp_path: Path, what: str) -> None:
    command = [sys.executable, "-m", "benchmarks.data", what, "--quick", "--out", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True)
    rows = json.loads((tmp_path / f"data-{what}.json").read_text())["rows"]
    for part, number in PARTS[what].items():
        found = [row for row in rows if row["part"].startswith(part)]
        assert len({row["name"] for row in found}) == len(found) == number
    values = [value for row in rows for value in row.values() if not isinstance(value, str)]
    assert all(math.isfinite(value) and value > 0 for value in values)
    text = (tmp_path / f"data-{what}.md").read_text()
    assert all(row["name"] in text for row in rows)


@pytest.mark.slow
def test_conversions_hold_a_small_part_of_what_they_convert(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.convert", "--out", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True)
    rows = {row["conversion"]: row for row in json.loads((tmp_path / "convert.json").read_text())["rows"]}
    images = rows.pop("checkpoint -> pipeline, images compared")
    assert len(rows) == 3
    for row in rows.values():
        assert row["over"] < row["size"] / 3, row
    # That the measure sees a model in memory at all.
    assert images["over"] > images["size"] / 2
    assert all(name in (tmp_path / "convert.md").read_text() for name in rows)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--dtype", "bfloat16", "--engine", "zero3"]], ids=["single", "zero3"])
def test_the_step_benchmark_has_every_variant_of_every_cell(tmp_path: Path, options: list[str]) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.step",
        "miniature",
        "--rounds",
        "1",
        "--samples",
        "2",
        "--out",
        tmp_path,
    ]
    subprocess.run([*command, *options], cwd=ROOT, check=True)
    (result,) = json.loads((tmp_path / "step.json").read_text()).values()
    assert len(result["cells"]) == 2
    for cell in result["cells"]:
        assert list(cell["seconds"]) == list(step_variants.VARIANTS)
        values = [cell["floor"], cell["rate"], *(seconds for (seconds,) in cell["seconds"].values())]
        assert all(math.isfinite(value) and value > 0 for value in values)
        assert sum(cell["profile"].values()) == pytest.approx(1)
    text = (tmp_path / "step.md").read_text()
    assert all(text.count(f"| {name} |") == 2 for name in step_variants.VARIANTS)


@pytest.mark.parametrize("cell", [0, 1], ids=["t2i", "edit"])
def test_a_naive_step_that_computes_something_else_is_not_timed(cell: int, monkeypatch: pytest.MonkeyPatch) -> None:
    size, name = SIZES["miniature"](), "naive"
    less = size.cells[cell].of(2)
    # Under the VLM's own mask queries do not see those after them; ours is still held against it with both ways open.
    outcome = step_variants.outcome
    monkeypatch.setattr(step_variants, "outcome", lambda model, run, batch, mask="": outcome(model, run, batch))
    monkeypatch.setitem(step_variants.NAIVE, name, Way(mask="causal"))
    with pytest.raises(AssertionError, match=r"condition is .* off ours"):
        step_variants.prepare(size, less, [name], "single", torch.device("cpu"), "float32")


def test_in_bfloat16_the_variant_that_is_farther_from_float32_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    size, name, device = SIZES["miniature"](), "naive", torch.device("cpu")
    cell, outcome = size.cells[0].of(2), step_variants.outcome

    def prepare(ours: float, naive: float) -> step_variants.Off:
        """With a condition that is off by these shares in bfloat16 alone."""

        def off(model, run, batch, mask="pathway"):
            states, losses = outcome(model, run, batch, mask)
            share = naive if isinstance(model, step_variants.NaiveModel) else ours
            return (states if states.dtype == torch.float32 else states + share * states.abs().max()), losses

        monkeypatch.setattr(step_variants, "outcome", off)
        return step_variants.prepare(size, cell, [name], "single", device, "bfloat16")[1]

    found = prepare(0.0, 0.0)
    assert found.off < 1e-4 < found.off_ours == pytest.approx(found.off_naive, rel=0.1)
    # Both as far off, by more than a bound for one would allow.
    assert prepare(0.05, -0.05).off_naive > 0.02
    with pytest.raises(AssertionError, match=r"naive: its condition is .* off float32, the other's"):
        prepare(0.0, 0.05)
    with pytest.raises(AssertionError, match=r"ours: its condition is .* off float32, the other's"):
        prepare(0.05, 0.0)


@pytest.mark.parametrize("name", step_variants.NAIVE)
def test_a_naive_step_trains_what_ours_trains_alike(name: str) -> None:
    """What follows the language model has the same gradients, so that equal losses are no accident of their value."""
    size, device = SIZES["miniature"](), torch.device("cpu")
    cell = size.cells[1].of(2)
    run = step_variants.make_run(cell, "single", "float32")
    model = step_variants.make_model(size, device, torch.float32)
    batch, way = step_variants.make_batch(size, cell, model.vlm.token_px), step_variants.NAIVE[name]
    found = []
    for each in ("ours", "naive"):
        if each == "naive":
            model.zero_grad()
            naive = step_variants.NaiveModel(model)
            naive.go(way, trains_dit=True)
            step_variants.FlowMatchingLoss(naive, run)(batch, 0).values.sum().backward()
        else:
            model.freeze_all_but(cell.trains)
            mask = step_variants.causal_pathway(model) if way.mask == "causal" else nullcontext()
            with mask:
                step_variants.FlowMatchingLoss(model, run)(batch, 0).values.sum().backward()
        parts = {"dit": model.dit, "mlp": model.bridge.position_mlp, "branch": model.bridge.vae_branch}
        found.append(
            {f"{part}.{n}": p.grad.clone() for part, module in parts.items() for n, p in module.named_parameters()}
        )
    for parameter, gradient in found[0].items():
        torch.testing.assert_close(
            found[1][parameter], gradient, atol=1e-5 * float(gradient.abs().max()), rtol=1e-3, msg=parameter
        )


def test_the_real_size_without_a_gpu_is_refused_with_what_can_be_done() -> None:
    command = [sys.executable, "-m", "benchmarks.step", "real", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs a GPU; valid on the cpu: miniature, middle" in done.stderr


def part(tmp_path: Path, script: str, limit: float = 60, beside: int = 1) -> verdict.Result:
    rows = tmp_path / "part.jsonl"
    start = f"from pathlib import Path; from benchmarks.gpu.verdict import *; f = Path({str(rows)!r}); "
    return verdict.run_part("part", [sys.executable, "-c", start + script], rows, limit, beside)


def test_what_a_part_of_the_gpu_benchmark_found_stays_however_it_ends(tmp_path: Path) -> None:
    row = "write_row(f, within('a', 1e-7, 1e-6)); "
    for folder in "123":
        (tmp_path / folder).mkdir(exist_ok=True)
    good = part(tmp_path / "1", row)
    crashed = part(tmp_path / "2", row + "raise ValueError('no such kernel')")
    begun = time.monotonic()
    slow = part(tmp_path / "3", row + "import time; time.sleep(600)", limit=8)
    assert time.monotonic() - begun < 300
    assert [result.rows for result in (good, crashed, slow)] == [
        [verdict.Row("a", "1.0e-07 (at most 1.0e-06)", "ok")]
    ] * 3
    assert [result.failed for result in (good, crashed, slow)] == [False, True, True]
    assert "ValueError: no such kernel" in crashed.ended
    assert slow.ended == "took more than 8 s and was stopped"
    assert verdict.within("a", math.nan, 1.0).state == "off"

    def fails() -> Iterator[verdict.Row]:
        yield verdict.Row("a", "1 ms")
        raise ValueError("no such\nkernel")

    # The other rows of its part stay.
    found = [row for name in "xy" for row in verdict.tried(name, fails())]
    assert [row.name for row in found] == ["a", "x: failed", "a", "y: failed"]
    assert (found[1].found, found[1].state) == ("ValueError: no such kernel", "off")
    beyond = verdict.Result("b", 1.0, "done", [verdict.within("a", 2e-6, 1e-6), verdict.Row("c", "no NCCL", "cannot")])
    assert beyond.failed
    about = {"command": "x", "where": "here", "torch": "2", "commit": "abc"}
    text = verdict.save(tmp_path, about, [good, crashed, beyond])
    assert "**Verdict: not equal, or not finished: part, b**; what cannot be run here: 1 rows." in text
    assert [one["failed"] for one in json.loads((tmp_path / "gpu.json").read_text())["parts"]] == [False, True, True]


def test_the_verdict_of_the_gpu_benchmark_judges_goals_and_a_missed_one_is_no_failure() -> None:
    cell = replace(SIZES["real"]().cells[0], samples=12)
    measured = {"ours": {"memory": {"peak": 80 * 1024.0}}, "ours, checkpointing": {}}
    plans: Future[dict[str, float]] = Future()
    waiting = [(cell, measured, plans)]
    assert not list(of_gpu.by_plans(waiting, 0.0))
    plans.set_result({"ours": 78 * 2.0**30, "ours, checkpointing": 50 * 2.0**30})
    seconds = {f"{cell.name}: naive": 0.5, f"{cell.name}: ours, checkpointing": 0.4}
    rows = [*of_gpu.by_plans(waiting, 0.0), *of_gpu.ratios(cell, ("naive",), seconds, real=True)]
    assert [(row.found, row.state) for row in rows] == [
        ("78.0 GiB planned, 80.0 measured: 1.03 (goal 0.9 to 1.1)", "met"),
        ("1.25 (goal 1.5)", "missed"),
    ]
    assert not waiting
    assert [row.state for row in of_gpu.ratios(cell, ("naive",), seconds, real=False)] == ["told"]
    result = verdict.Result("step", 1.0, "done", rows)
    assert result.finished
    missed = f"{cell.name}: naive / ours, checkpointing"
    assert verdict.verdict([result]) == (f"**Verdict: within the bounds: step**; goals met: 1 of 2, missed: {missed}.")


@pytest.mark.slow
def test_a_plan_knows_the_models_of_the_gpu_benchmark() -> None:
    size = SIZES["real"]()
    cell = size.cells[0].of(2)
    plans = of_gpu.planned(cell, size.text)
    # Of 12 samples one H200 had 75.9 GiB at the peak, of which most do not depend on the samples.
    assert 30 * 2**30 < plans["ours, checkpointing"] < plans["ours"] < 75.9 * 2**30


def test_parts_of_the_gpu_benchmark_that_run_side_by_side_share_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores, script = len(os.sched_getaffinity(0)), "import os; write_row(f, Row(os.environ.get('OMP_NUM_THREADS'), ''))"
    threads = [part(tmp_path, script, beside=beside).rows[-1].name for beside in (1, cores, 3 * cores)]
    assert threads == [None, "1", "1"]


def test_the_gpu_benchmark_goes_on_where_an_earlier_call_ended(tmp_path: Path) -> None:
    about = {"command": "x", "where": "here", "torch": "2", "commit": "unknown", "code": "abc", "time": "now"}
    done = verdict.Result("a", 1.0, "done", [verdict.within("x", 1e-7, 1e-6), verdict.Row("y", "3 ms", value=3e-3)])
    left = verdict.Result("b", 1.0, "done", [verdict.Row("z", "not run: the time is up", "left")])
    stopped, off = (
        verdict.Result("c", 1.0, "took more than 1 s"),
        verdict.Result("d", 1.0, "done", [verdict.within("v", 2, 1)]),
    )
    assert "1 rows are left for the next call" in verdict.save(tmp_path, about, [done, left])
    verdict.save(tmp_path, about, [done, left, stopped, off])
    later = about | {"command": "y", "time": "later"}
    assert verdict.load(tmp_path, later) == [done, left, stopped, off]
    assert [result.finished for result in verdict.load(tmp_path, later)] == [True, False, False, False]
    for other in ({"code": "abd"}, {"where": "there"}, {"steps": 4}):
        assert verdict.load(tmp_path, later | other) == []
    assert verdict.load(tmp_path / "nowhere", later) == []


def test_the_gpu_benchmark_keeps_time_for_its_last_part() -> None:
    """Under ten minutes in all, imports included, if every part takes all that it may."""
    *timed, last = (part for part in PARTS_OF_GPU.values() if part.timed)
    before = max(part.limit for part in PARTS_OF_GPU.values() if not part.timed) + sum(part.limit for part in timed)
    assert before + 200 < 60 * 9.3 < 570
    assert last.function == "steps"


@pytest.mark.parametrize("study", ablation.Study)
def test_every_arm_of_an_ablation_differs_from_the_first_in_its_fields_alone(study: ablation.Study, tmp_path: Path):
    plan = ablation.STUDIES[study]
    first = load_curriculum(ablation.CONFIGS / plan.config).stages[0].steps
    dumped, tasks = {}, []
    for arm, fields in plan.arms.items():
        job = ablation._job(tmp_path, tmp_path / "data", arm, 1, 2 * first, plan, fields)
        curriculum = load_curriculum(job.curriculum)
        # All arms read one data set, whose settings name the tasks.
        tasks.append(plan_of_data(curriculum).resolutions)
        stages = (config := curriculum.model_dump())["stages"]
        assert [stage["steps"] for stage in stages] == [
            2 * stage.steps for stage in load_curriculum(ablation.CONFIGS / plan.config).stages[: plan.stages]
        ]
        dumped[arm] = (config.pop("recipe"), config.pop("stages"), config | {"name": ""})
    recipe, stages, rest = dumped.pop(next(iter(plan.arms)))
    for other_recipe, other_stages, other_rest in dumped.values():
        assert (other_recipe, other_stages) != (recipe, stages)
        assert other_rest == rest
    assert all(each == tasks[0] for each in tasks)


def test_arms_of_an_ablation_are_compared_seed_by_seed():
    rows = [
        {"arm": arm, "seed": seed, "stages": {"stage1": {"edit": value}}}
        for arm, values in {"base": (0.1, 0.5, 0.3), "other": (0.2, 0.7, 0.6)}.items()
        for seed, value in enumerate(values)
    ]
    (found,) = ablation.compared(rows, "base")
    assert found["difference"] == pytest.approx(0.2)
    # 4.303 is Student's t for two degrees of freedom; 0.1 is the standard deviation of 0.1, 0.2, 0.3.
    assert found["half"] == pytest.approx(4.303 * 0.1 / 3**0.5, abs=1e-4)


# Imports the modules that it is given as if there were a GPU; prints which lines have it begin to work.
WITH_A_GPU = """
import sys, traceback, torch
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
def begin(*_):
    print(*traceback.format_stack())
    raise RuntimeError("no GPU")
torch.cuda._lazy_init = torch._C._cuda_getDeviceCount = begin
for name in sys.argv[1:]:
    __import__(name)
"""


@pytest.mark.slow
@pytest.mark.parametrize("modules", [[PRELOADED_FOR_STEPS], PRELOADED_FOR_RANKS], ids=["steps", "ranks"])
def test_what_processes_are_forked_from_leaves_a_gpu_alone(modules: list[str]) -> None:
    command = [sys.executable, "-c", WITH_A_GPU, *modules]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout == ""


GPU = [sys.executable, "-m", "benchmarks.gpu"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_gpu_benchmark_without_a_gpu_ends_with_a_sentence(tmp_path: Path) -> None:
    done = subprocess.run([*GPU, "--out", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == FINAL
    assert done.stderr.startswith("torch sees no GPU here; `--device cpu` runs the same code")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    """The parts that take seconds; the others are benchmarks.step and a run that is killed and resumed."""
    only = ["parity", "kernels", "zero3", "hybrid", "sampling"]
    command = [*GPU, "--device", "cpu", "--only", ",".join(only), "--steps", "4", "--minutes", "30", "--out", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"CXX": "/nowhere", "PATH": "/usr/sbin"})
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [one["part"] for one in parts] == only
    names = [row["name"] for one in parts for row in one["rows"]]
    assert len(set(names)) == len(names) > 30


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees none")
@pytest.mark.parametrize("name", ["parity", "kernels", "zero3", "hybrid", "miniature"])
def test_on_a_gpu(name: str, tmp_path: Path) -> None:
    done = subprocess.run([*GPU, "--only", name, "--out", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
