"""Slurm and Weights & Biases, as far as they can be judged without the network."""

import netrc
import os
import shutil
from pathlib import Path
from urllib.parse import urlparse

from wemmu.config import Curriculum
from wemmu.diagnosis.commands import answer
from wemmu.diagnosis.findings import Call, Finding, short

SLURM_TIMEOUT_S = 5.0
_WANDB = "https://api.wandb.ai"


def calls(curriculum: Curriculum | None) -> list[Call]:
    return [(slurm,), (wandb, curriculum)]


def slurm(timeout_s: float = SLURM_TIMEOUT_S) -> Finding:
    if shutil.which("sinfo") is None:
        return Finding("Slurm", "ok", "not here: the launcher runs jobs on this machine")
    try:
        version = answer(["sinfo", "--version"], timeout_s).output
        done = answer(["sinfo", "--noheader", "--format=%R %a"], timeout_s)
    except (TimeoutError, OSError) as error:
        return Finding("Slurm", "problem", f"sinfo is here, but: {error}", _slurm_remedy())
    if done.code:
        return Finding("Slurm", "problem", f"{version}, but sinfo says: {short(done.output)}", _slurm_remedy())
    up = sorted({line.split()[0] for line in done.output.splitlines() if line.split()[-1] == "up"})
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
    """Whether what the curriculum asks for could be sent. A key is looked for, never read out."""
    mode = curriculum.logging.wandb if curriculum else "offline"
    try:
        key = _wandb_key()
    # Its message may quote the line, and with it the key.
    except (netrc.NetrcParseError, UnicodeDecodeError):
        key = None
        if mode == "online":
            return Finding("W&B", "problem", "the netrc file cannot be parsed", "correct it, or set WANDB_API_KEY")
    found = f"{mode}; key {f'in {key}' if key else 'not found'}"
    if mode == "online" and key is None:
        remedy = (
            "`wandb login`, or WANDB_API_KEY, or logging.wandb: offline and `wandb sync` afterwards; without a key a "
            "run goes on, but W&B sees nothing of it"
        )
        return Finding("W&B", "problem", found, remedy)
    return Finding("W&B", "ok", found)


def _wandb_key() -> str | None:
    """Where a key is."""
    if os.environ.get("WANDB_API_KEY"):
        return "WANDB_API_KEY"
    host = urlparse(os.environ.get("WANDB_BASE_URL", _WANDB)).hostname
    named = os.environ.get("NETRC")
    for file in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        if file.is_file() and host in netrc.netrc(file).hosts:
            return file.name
    return None
