"""Checks Slurm and Weights & Biases without the network."""

import shutil

from wemmu.config import Curriculum
from wemmu.config.schema import Logging
from wemmu.config.wandb_mode import find_key, wandb_mode
from wemmu.diagnosis.commands import answer
from wemmu.diagnosis.findings import Call, Finding, short

SLURM_TIMEOUT_S = 5.0


def calls(curriculum: Curriculum | None) -> list[Call]:
    return [(slurm,), (wandb, curriculum)]


def slurm(timeout_s: float = SLURM_TIMEOUT_S) -> Finding:
    if shutil.which("sinfo") is None:
        return Finding("Slurm", "ok", "not here: the launcher runs jobs on this machine")
    try:
        _, version = answer(["sinfo", "--version"], timeout_s)
        code, output = answer(["sinfo", "--noheader", "--format=%R %a"], timeout_s)
    except (TimeoutError, OSError) as error:
        return Finding("Slurm", "problem", f"sinfo is here, but: {error}", _slurm_remedy())
    if code:
        return Finding("Slurm", "problem", f"{version}, but sinfo says: {short(output)}", _slurm_remedy())
    up = sorted({line.split()[0] for line in output.splitlines() if line.split()[-1] == "up"})
    if not up:
        remedy = "ask the administrator, or `scontrol update partition=NAME state=up`"
        return Finding("Slurm", "warning", f"{version}, no partition is up", remedy)
    return Finding("Slurm", "ok", f"{version}, partitions: {', '.join(up)}")


def _slurm_remedy() -> str:
    return (
        "run `scontrol ping`: is slurmctld up, is munge, and does this machine reach it? Until then no job can be "
        "submitted from here; the launcher can run on this machine all the same"
    )


def wandb(curriculum: Curriculum | None) -> Finding:
    """Check whether the upload that the curriculum asks for is possible. Looks for a key, never reads its value."""
    asked = curriculum.logging if curriculum else Logging()
    mode, (key, reason) = wandb_mode(asked).name, find_key()
    if mode == "online" and key is None:
        remedy = (
            "`wandb login`, or WANDB_API_KEY, or logging.wandb: offline and tools/wandb_sync.py afterwards; without a "
            "key a run goes on, but W&B sees nothing of it"
        )
        return Finding("W&B", "problem", f"{mode}; {reason}", remedy)
    return Finding("W&B", "ok", f"{mode}; {reason}")
