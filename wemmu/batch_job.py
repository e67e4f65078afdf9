"""What Slurm tells a process of a job; `launcher/slurm.py` has Slurm's commands. Another scheduler changes both."""

import os
import re
import socket
import subprocess
from collections.abc import Mapping
from contextlib import suppress

# Seconds that Slurm's controller may take to answer.
_PATIENCE_S = 60.0
# Variables of a job, without those of Slurm's commands that describe the site or its user.
_OF_A_JOB = re.compile(r"SLURMD?_(?!(CONF|CONF_SERVER|CLUSTERS|JWT|TIME_FORMAT|EXIT_ERROR|DEBUG_FLAGS)$)")


def job_id() -> str | None:
    """Return the id of the job that this process belongs to; None outside a job."""
    return os.environ.get("SLURM_JOB_ID")


def node_count() -> int:
    """Return the number of nodes of the job; 1 outside a job."""
    return int(os.environ.get("SLURM_JOB_NUM_NODES", 1))


def node_names() -> str:
    """Return the job's nodes in Slurm's short form, as `n[1-4,7]`; empty outside a job."""
    return os.environ.get("SLURM_JOB_NODELIST", "")


def node_number() -> int:
    """Return which of the job's nodes this one is, from 0."""
    return int(os.environ.get("SLURM_NODEID", 0))


def task(variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return RANK, WORLD_SIZE and LOCAL_RANK of a task that srun started; empty for other processes."""
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    return {ours: variables.get(name, "0") for ours, name in names.items() if names["WORLD_SIZE"] in variables}


def step(variables: Mapping[str, str]) -> tuple[int, str]:
    """Return a number that only the tasks of this srun share, and its first node; an empty name if it is unknown."""
    number = int(variables.get("SLURM_JOB_ID", 0)) + 1009 * int(variables.get("SLURM_STEP_ID", 0))
    alone = variables.get("SLURM_STEP_NUM_NODES", "1") == "1"
    return number, "127.0.0.1" if alone else first_node(variables.get("SLURM_STEP_NODELIST", ""))


def first_node(nodes: str) -> str:
    """Return the first of a list of nodes in Slurm's short form."""
    return re.sub(r"\[(\w+)[^]]*]", r"\1", nodes).split(",")[0]


def node_address(node: str) -> str:
    """Return how other nodes reach `node`, whose name need not be one of the network; empty if that is unknown."""
    with suppress(OSError):
        socket.getaddrinfo(node, None)
        return node
    command = ["scontrol", "--oneliner", "show", "node", node]
    with suppress(OSError, subprocess.TimeoutExpired):
        output = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=_PATIENCE_S, check=False).stdout
        return "".join(re.findall(r"\bNodeAddr=(\S+)", output)[:1])
    return ""


def environment_outside() -> dict[str, str]:
    """Return the environment without the variables of this job, which must not reach a job that it submits."""
    return {name: value for name, value in os.environ.items() if job_id() is None or not _OF_A_JOB.match(name)}
