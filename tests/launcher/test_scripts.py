"""What the scripts of slurm/ do before Python runs."""

import os
import re
import subprocess
from pathlib import Path

from wemmu.config import load_curriculum

SCRIPT = Path(__file__).parents[2] / "slurm" / "job.sh"


def prepare(**environment: str) -> "subprocess.CompletedProcess[str]":
    body = f"set -euo pipefail; source {SCRIPT}; prepare; echo prepared"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("BASH_FUNC", "LMOD", "MODULE"))}
    return subprocess.run(["bash", "-c", body], env=clean | environment, capture_output=True, text=True)


def test_a_prolog_may_read_variables_that_are_not_set(tmp_path: Path):
    prolog = tmp_path / "prolog.sh"
    prolog.write_text('echo "prolog${CONDA_BACKUP_NOT_SET}"\n')
    assert prepare(PROLOG=str(prolog)).stdout == "prolog\nprepared\n"


def test_module_is_made_a_function_from_its_init(tmp_path: Path):
    (tmp_path / "init").mkdir()
    (tmp_path / "init/bash").write_text('module() { echo "module $*${NOT_SET}"; }\n')
    done = prepare(MODULES="cuda gcc", MODULESHOME=str(tmp_path))
    assert done.stdout == "module load cuda\nmodule load gcc\nprepared\n"


def test_the_papers_curriculum_has_a_rank_for_each_gpu_that_its_scripts_ask_for():
    ranks = load_curriculum(SCRIPT.parents[1] / "configs/curriculum/paper.yaml").parallel.ranks
    for number in range(1, 5):
        head = SCRIPT.with_name(f"stage{number}.sh").read_text()
        nodes, gpus = (int(re.search(pattern, head)[1]) for pattern in (r"--nodes=(\d+)", r"--gres=gpu:(\d+)"))
        assert nodes * gpus == ranks
