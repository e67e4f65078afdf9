"""Records the machine and the code of each attempt at a stage: one line of RUN/STAGE/environment.jsonl."""

import platform
import socket
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from wemmu import batch_job
from wemmu.checkpoint.store import LIBRARIES
from wemmu.jsonlines import append_line
from wemmu.revision import revision

FILE = "environment.jsonl"


def record(folder: Path, step: int, device: torch.device) -> None:
    """Append a line for this attempt; `step`: the step it resumes from."""
    code = revision()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    said: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "from_step": step,
        "commit": code.commit if code else None,
        "dirty": code.dirty if code else None,
        "host": socket.gethostname(),
        "gpu": gpu,
        "cuda": torch.version.cuda if gpu else None,
        "slurm_job": batch_job.job_id(),
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }
    append_line(folder / FILE, {key: value for key, value in said.items() if value is not None})
