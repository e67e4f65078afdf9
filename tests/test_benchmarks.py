"""The benchmarks run; how fast anything is, no test says."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = {"Writing": 4, "Reading a sample at 256 px": 13, "Reading a sample at 512 px": 13, "Growing": 2}


@pytest.mark.slow
def test_the_data_benchmark_has_every_row(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "benchmarks.data", "--quick", "--out", tmp_path], cwd=ROOT, check=True)
    rows = json.loads((tmp_path / "data.json").read_text())["rows"]
    for part, number in PARTS.items():
        found = [row for row in rows if row["part"].startswith(part)]
        assert len({row["name"] for row in found}) == len(found) == number
    values = [value for row in rows for value in row.values() if not isinstance(value, str)]
    assert all(math.isfinite(value) and value > 0 for value in values)
    text = (tmp_path / "data.md").read_text()
    assert all(row["name"] in text for row in rows)
