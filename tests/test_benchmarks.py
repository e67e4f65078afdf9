"""The benchmarks run; how fast anything is, no test says."""

import json
import math
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from benchmarks import step_variants
from benchmarks.naive import Way
from benchmarks.step_sizes import SIZES

ROOT = Path(__file__).resolve().parents[1]
PARTS = {
    "speed": {"Writing": 4, "Reading a sample at 256 px": 13, "Reading a sample at 512 px": 13},
    "growth": {"Growing": 2},
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
def test_the_checkpoint_benchmark_has_both_ways_of_saving(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--quick", "--out", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True)
    rows = json.loads((tmp_path / "checkpoint.json").read_text())["rows"]
    assert [row["saving"] for row in rows][1:] == ["at once", "in the background"]
    assert all(math.isfinite(row[column]) for row in rows for column in ("call", "lost", "late"))
    text = (tmp_path / "checkpoint.md").read_text()
    assert all(row["saving"] in text for row in rows)


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
    run = step_variants.make_run(size, cell, "single", "float32")
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
