"""Builds the `srun` command of a job on its nodes, and the address where the ranks connect."""

import json
import os
import socket
import sys
from pathlib import Path

from launcher import slurm
from launcher.cluster import Cluster, Container
from launcher.job import Job
from wemmu.config.files import replace_text

# Below Linux's ephemeral ports (32768 and above).
_PORTS_FROM, _PORTS = 20000, 10000
# Seconds until the other nodes are killed after the first one has ended.
_STRAGGLERS_S = 120
# Environment variables that change results or speed; none of them is a secret.
_RECORDED = ("CUDA_", "NCCL_", "GLOO_", "OMP_", "MKL_", "TORCH_", "PYTORCH_", "TRITON_", "DS_", "HF_HUB_OFFLINE", "TZ")


def command(job: Job, cluster: Cluster | None) -> list[str]:
    """Return the `srun` command of a job: one task per node, which starts and watches the node's ranks."""
    trains = job.steps is not None
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", 1)) if trains else 1
    srun = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--export=ALL"]
    srun += [f"--wait={_STRAGGLERS_S}", "--kill-on-bad-exit=0", "--unbuffered"]
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
        srun.append(f"--cpus-per-task={cpus}")
    python, container = sys.executable, cluster.container if cluster else None
    if container:
        srun += _in_container(container)
        python = container.python
    own = [python if word == sys.executable else word for word in job.command]
    if not trains and job.ranks == 1:
        return [*srun, *own]
    watch = ["--nodes", str(nodes), "--hang-after", str(job.hang_after), str(job.ranks // nodes)]
    return [*srun, python, "-m", "launcher.ranks", *watch, *own]


def check_layout(job: Job) -> None:
    """Check that the nodes of this Slurm job can share the ranks.

    Raises:
        ValueError: lists the valid numbers of nodes.
    """
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", 1))
    if job.steps is not None and job.ranks % nodes:
        valid = ", ".join(str(n) for n in range(1, job.ranks + 1) if job.ranks % n == 0)
        raise ValueError(
            f"parallel.ranks is {job.ranks}, which cannot be divided among the {nodes} nodes of this Slurm job; valid "
            f"numbers of nodes: {valid} (sbatch --nodes=N); or engine zero3 and a multiple of {nodes} in parallel.ranks"
        )


def _in_container(container: Container) -> list[str]:
    # Paths of a run are relative to the launcher's working directory.
    here, mounts = Path.cwd(), list(container.mounts)
    if not any(here.is_relative_to((mount.split(":") * 2)[1]) for mount in mounts):
        mounts.append(f"{here}:{here}")
    return [
        f"--container-image={container.image}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={here}",
    ]


def rendezvous(job: Job, slurm_id: int, nodes: str) -> dict[str, str]:
    """Return the address where the ranks connect: this node, the first one, and a port that follows from the job id."""
    if job.steps is None:
        return {}
    port = _PORTS_FROM + slurm_id % _PORTS
    # If another process uses the port, take the next one.
    while not _is_free(port):
        port = _PORTS_FROM + (port + 1009 - _PORTS_FROM) % _PORTS
    return {"MASTER_ADDR": slurm.patiently(slurm.address, slurm.first_node(nodes)), "MASTER_PORT": str(port)}


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
