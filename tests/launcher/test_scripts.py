"""What the scripts of slurm/ do before Python runs."""

import os
import subprocess
from pathlib import Path

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
