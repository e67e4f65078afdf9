"""The harness itself: ranks speak with each other, and a failure is told with its cause."""

import ctypes
import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.parallel.ranks import RankError, on_ranks


def add_ranks(rank: int, world: int, more: int) -> float:
    x = torch.tensor([float(rank + more)])
    dist.all_reduce(x)
    return float(x)


def fail_on_one(rank: int, world: int) -> None:
    if rank == 1:
        raise ValueError("the cause")
    time.sleep(60)


def die_on_one(rank: int, world: int) -> None:
    if rank == 1:
        print("I am", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 9)
    time.sleep(60)


def crash_on_one(rank: int, world: int) -> None:
    if rank == 1:
        ctypes.string_at(0)
    time.sleep(60)


def test_ranks_speak_with_each_other() -> None:
    assert on_ranks(3, add_ranks, 1) == [6.0] * 3


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (fail_on_one, "the cause"),
        (die_on_one, "was killed by SIGKILL; if nobody did it, the system had no memory left; its last words:\nI am"),
        (crash_on_one, "was killed by SIGSEGV(?s:.*)crash_on_one"),
    ],
)
def test_a_failure_is_told_and_the_others_are_ended(function, told: str) -> None:
    with pytest.raises(RankError, match=rf"(?s)rank 1 of 2.*{told}"):
        on_ranks(2, function)


def test_ranks_that_hang_are_named() -> None:
    with pytest.raises(RankError, match=r"ranks \[0, 1\] of 2 are not done in time"):
        on_ranks(2, fail_on_one_never, timeout=3)


def fail_on_one_never(rank: int, world: int) -> None:
    time.sleep(60)
