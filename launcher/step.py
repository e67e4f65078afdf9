"""Builds the command of a job on its nodes, and the address where the ranks connect."""

import json
import os
import socket
import sys

from launcher import slurm
from launcher.cluster import Cluster
from launcher.job import Job
from wemmu import batch_job
from wemmu.config.files import replace_text

# Below Linux's ephemeral ports (32768 and above).
_PORTS_FROM, _PORTS = 20000, 10000
# Environment variables that change results or speed; none of them is a secret.
_RECORDED = ("CUDA_", "NCCL_", "GLOO_", "OMP_", "MKL_", "TORCH_", "PYTORCH_", "TRITON_", "DS_", "HF_HUB_OFFLINE", "TZ")


def command(job: Job, cluster: Cluster | None) -> list[str]:
    """Return the command of a job: one task per node, which starts and watches the node's ranks."""
    trains = job.steps is not None
    nodes, container = batch_job.node_count() if trains else 1, cluster.container if cluster else None
    start, python = slurm.on_nodes(nodes, container), container.python if container else sys.executable
    own = [python if word == sys.executable else word for word in job.command]
    if not trains and job.ranks == 1:
        return [*start, *own]
    watch = ["--nodes", str(nodes), "--hang-after", str(job.hang_after), str(job.ranks // nodes)]
    return [*start, python, "-m", "launcher.ranks", *watch, *own]


def check_layout(job: Job) -> None:
    """Check that the nodes of this Slurm job can share the ranks.

    Raises:
        ValueError: lists the valid numbers of nodes.
    """
    nodes = batch_job.node_count()
    if job.steps is not None and job.ranks % nodes:
        valid = ", ".join(str(n) for n in range(1, job.ranks + 1) if job.ranks % n == 0)
        raise ValueError(
            f"parallel.ranks is {job.ranks}, which cannot be divided among the {nodes} nodes of this Slurm job; valid "
            f"numbers of nodes: {valid} (sbatch --nodes=N); or engine zero3 and a multiple of {nodes} in parallel.ranks"
        )


def rendezvous(job: Job, slurm_id: int, nodes: str) -> dict[str, str]:
    """Return the address where the ranks connect: this node, the first one, and a port that follows from the job id."""
    if job.steps is None:
        return {}
    port = _PORTS_FROM + slurm_id % _PORTS
    # If another process uses the port, take the next one.
    while not _is_free(port):
        port = _PORTS_FROM + (port + 1009 - _PORTS_FROM) % _PORTS
    return {"MASTER_ADDR": slurm.patiently(slurm.address, batch_job.first_node(nodes)), "MASTER_PORT": str(port)}


def record_environment(job: Job) -> None:
    """Write the variables that change results or speed beside the job's log."""
    kept = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_RECORDED)}
    replace_text(job.log.with_suffix(".environment.json"), json.dumps(kept, indent=1) + "\n")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
