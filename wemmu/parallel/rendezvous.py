"""Connects the ranks of a run by the environment variables of torchrun, the launcher or srun."""

import os
import socket
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from wemmu import batch_job
from wemmu.checkpoint.collective import all_ranks
from wemmu.config.schema import Parallel
from wemmu.parallel.topology import Topology

# Below the ports that Linux hands out by itself (32768 and above).
_PORTS_FROM, _PORTS = 20000, 10000
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class RanksError(ValueError):
    """The started processes are not the ranks in the config."""


class RendezvousError(RuntimeError):
    """The ranks could not connect."""


def connect(parallel: Parallel) -> tuple[Topology, torch.device]:
    """Join the other ranks of the run, if there are any, and take a device.

    Raises:
        RanksError: if the number of processes is wrong, the rank is out of range, or an address is missing; says how to
            start them. On all ranks, if some have a GPU and others have none.
        RendezvousError: if the port is in use, or a rank does not connect.
    """
    found = environment(os.environ)
    world, rank = _number(found, "WORLD_SIZE", 1), _number(found, "RANK", 0)
    if world != parallel.ranks:
        raise RanksError(
            f"parallel.ranks is {parallel.ranks}, but {world} process{'es' if world != 1 else ''} run; start them with "
            f"`torchrun --nproc-per-node {parallel.ranks} -m wemmu.train ...` or "
            f"`srun --ntasks={parallel.ranks} wemmu train ...`, or use the launcher"
        )
    if not 0 <= rank < world:
        raise RanksError(f"RANK is {rank}, but WORLD_SIZE is {world}; valid ranks: 0 to {world - 1}")
    if world > 1 and (absent := [name for name in _NAMES if name != "LOCAL_RANK" and name not in found]):
        raise RanksError(
            f"{world} ranks need {', '.join(absent)} in the environment, as torchrun and the launcher set them"
        )
    device = _device(found, world)
    if world > 1 and not dist.is_initialized():
        os.environ |= found
        # Both back ends, so that what is on a CPU can be exchanged, too: checkpoints, metrics, the wish to stop.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(minutes=30))
        except (RuntimeError, ValueError) as error:
            raise _unmet(found, rank, error) from error
    _alike(all_ranks().answers((socket.gethostname(), device.type)))
    return Topology(rank, world, parallel.tp, parallel.pp), device


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT as far as set, also by srun's variables.

    An empty variable counts as one that is not set.
    """
    found = {name: value for name in _NAMES if (value := variables.get(name, "").strip())}
    if "RANK" in found or "WORLD_SIZE" in found or not (task := batch_job.task(variables)):
        return found
    number, node = batch_job.step(variables)
    where = {"MASTER_PORT": str(_PORTS_FROM + number % _PORTS)}
    if "MASTER_ADDR" not in found and node:
        where["MASTER_ADDR"] = batch_job.node_address(node)
        if not where["MASTER_ADDR"]:
            raise RanksError(f"the name {node} of the first node has no address; give the node's own in MASTER_ADDR")
    return where | task | found


def _number(found: Mapping[str, str], name: str, absent: int) -> int:
    try:
        return int(found.get(name, absent))
    except ValueError:
        raise RanksError(f"{name} is {found[name]!r}, which is not a whole number") from None


def _device(found: Mapping[str, str], world: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    here, local = torch.cuda.device_count(), _number(found, "LOCAL_RANK", 0)
    if world > 1 and "LOCAL_RANK" not in found:
        raise RanksError(f"{world} ranks need LOCAL_RANK in the environment: the number of the GPU, 0 to {here - 1}")
    # Under `srun --gpus-per-task=1` each task sees its own GPU alone.
    local = 0 if here == 1 and batch_job.task() else local
    if not 0 <= local < here:
        raise RanksError(f"LOCAL_RANK is {local}, but there are {here} GPUs here; start one rank for each at most")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def _alike(ranks: Sequence[tuple[str, str]]) -> None:
    """Refuse ranks on different kinds of devices: they would compute by different kernels and wait for each other.

    ranks: of each its machine and the type of its device.
    """
    without = [(rank, host) for rank, (host, device) in enumerate(ranks) if device == "cpu"]
    if 0 < len(without) < len(ranks):
        rank, host = without[0]
        raise RanksError(
            f"{len(without)} of {len(ranks)} ranks see no GPU, the first is rank {rank} on {host}; repair that machine "
            "or leave it out (`nvidia-smi` there says more), or hide the GPUs of all ranks with CUDA_VISIBLE_DEVICES="
        )


def _unmet(found: Mapping[str, str], rank: int, error: Exception) -> RendezvousError:
    place = f"{found['MASTER_ADDR']}:{found['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"
    said = str(error).splitlines()[0]
    if rank == 0 and "EADDRINUSE" in str(error):
        return RendezvousError(f"the ranks cannot meet at {place}: the port is in use; give another MASTER_PORT")
    return RendezvousError(
        f"rank {rank} did not meet the others at {place}: {said}. Were all {found['WORLD_SIZE']} ranks started, and "
        "can this machine reach that one?"
    )
