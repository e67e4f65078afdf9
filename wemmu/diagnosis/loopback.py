"""Two local processes sum a number: `python -m wemmu.diagnosis.loopback gloo|nccl`.

A program of its own, so that the caller can kill it and its children whatever they wait for.
"""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist

RANKS = 2
SUCCESS = "the sum is right"
# For each other; before that they import torch, which takes long where it lies on a shared file system.
_PATIENCE = timedelta(seconds=60)


def rank(number: int, backend: str, port: int) -> None:
    """Run one of the two processes."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=_PATIENCE)
    dist.init_process_group(backend, store=store, rank=number, world_size=RANKS, timeout=_PATIENCE)
    device = torch.device("cuda", number) if backend == "nccl" else torch.device("cpu")
    value = torch.tensor([number + 1.0], device=device)
    dist.all_reduce(value)
    assert value.item() == sum(range(1, RANKS + 1)), f"rank {number} got {value.item()}"
    dist.destroy_process_group()


def main(backend: str) -> None:
    # The system picks a free port, and the store keeps it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=_PATIENCE)
    torch.multiprocessing.spawn(rank, (backend, store.port), nprocs=RANKS)
    print(SUCCESS)


if __name__ == "__main__":
    main(sys.argv[1])
