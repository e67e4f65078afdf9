"""The benchmarks run; how fast anything is, no test says."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

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
    pictures = rows.pop("checkpoint -> pipeline, pictures compared")
    assert len(rows) == 3
    for row in rows.values():
        assert row["over"] < row["size"] / 3, row
    # That the measure sees a model in memory at all.
    assert pictures["over"] > pictures["size"] / 2
    assert all(name in (tmp_path / "convert.md").read_text() for name in rows)
