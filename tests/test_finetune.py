"""docs/finetune.md, typed as it stands, on the miniature's shipped weights as an export."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/finetune.md").read_text(encoding="utf-8")


def typed(folder: Path, *command: str) -> str:
    # `python -m` and `wemmu` of this checkout, wherever the environment's are.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_commands_of_the_page_run(tmp_path: Path) -> None:
    for name in ("assets", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    # A run of one step, as short as one gets, for an export of the real shape.
    typed(
        tmp_path,
        *(sys.executable, "-m", "wemmu", "run", "configs/shapes/demo.yaml", "--set", "stages.*.steps=1"),
        *("--set", "stages.*.optimizer.warmup=0", "--set", "stages.*.optimizer.decay=0"),
        *(
            "--set",
            "data.prepare.sources.0.samples={t2i: 96, reconstruction: 64, unconditional: 64, edit: 96, multi_edit: 64}",
        ),
        *("--set", "evaluation.prompts=0", "--set", "stages.*.global_batch=4", "--set", "sampling.prompts=[]"),
    )
    commands = "".join(re.findall(r"```bash\n(.*?)```", PAGE, re.S)).replace("wemmu ", f"{sys.executable} -m wemmu ")
    commands = commands.replace("stages.finetune.steps=200", "stages.finetune.steps=2")
    commands = commands.replace("finetune write", "finetune write --edits 70 --images 70")
    typed(tmp_path, "bash", "-ec", commands)
    lines = [json.loads(line) for line in (tmp_path / "runs/finetune/finetune/metrics.jsonl").read_text().splitlines()]
    # Weights that edit already do not copy what they have never been asked.
    assert 0 <= next(line["copy_rate/edit"] for line in lines if "copy_rate/edit" in line) <= 1
    assert Image.open(tmp_path / "painted.png").size == (64, 64)
    assert (tmp_path / "runs/finetune/export/parity.json").is_file()
