"""Runs a function on several gloo ranks, each a process of its own.

    results = on_ranks(4, function, argument, ...)      # [what rank 0 returned, rank 1, ...]

The processes are forked from a server that has imported the heavy libraries once: a launch takes well under a second.
`function` must stand at the top of a module and be called as `function(rank, world, *arguments)`; arguments and results
are pickled. Tensors in results must not be huge.
"""

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# On a GPU, none of them may touch it: CUDA refuses to begin anew in a process forked after that.
PRELOADED = [
    "torch.distributed.pipelining",
    "torch.distributed.checkpoint",
    "tests.models.world",
    "deepspeed",
    "wemmu.measuring.__main__",
    "wemmu.parallel.hybrid",
]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(PRELOADED)


class _DiedError(Exception):
    """A rank, the argument, ended without sending anything."""


class RankError(AssertionError):
    """A rank failed; the message is its traceback. The first that failed is the one that is told."""


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any, timeout: float = 240) -> list[Any]:
    """Run `function(rank, world, *arguments)` on `world` ranks; the results in the order of the ranks.

    Raises:
        RankError: if a rank raised, died, or is not done after `timeout` seconds. No rank is left running.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Anonymous pipes and a file as the meeting place: no port to collide on.
        pipes = [SERVER.Pipe(duplex=False) for _ in range(world)]
        ranks = [
            SERVER.Process(target=_rank, args=(rank, world, folder, send, function, arguments), daemon=True)
            for rank, (_, send) in enumerate(pipes)
        ]
        for process in ranks:
            process.start()
        for _, send in pipes:
            send.close()
        try:
            return _collect([receive for receive, _ in pipes], time.monotonic() + timeout)
        except _DiedError as error:
            rank = error.args[0]
            ranks[rank].join(10)
            words = Path(folder, f"words{rank}").read_text(errors="replace")[-4000:]
            raise RankError(f"rank {rank} of {world} {_end(ranks[rank].exitcode)}; its last words:\n{words}") from None
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _collect(pipes: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = {pipes[rank]: rank for rank in range(len(pipes)) if rank not in results}
        ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(waiting.values())} of {len(pipes)} are not done in time")
        # A rank that fails takes others down with it: what counts is who raised first.
        failures = []
        for pipe in ready:
            rank = waiting[pipe]
            try:
                failed_at, value = pipe.recv()
            except EOFError:
                failed_at, value = time.monotonic(), None
            if failed_at is not None:
                failures.append((failed_at, rank, value))
            results[rank] = value
        if failures:
            _, rank, value = min(failures, key=itemgetter(0))
            if value is None:
                raise _DiedError(rank)
            raise RankError(f"rank {rank} of {len(pipes)}:\n{value}")
    return [results[rank] for rank in range(len(pipes))]


def _end(code: int | None) -> str:
    if code is None:
        return "closed its pipe and goes on"
    if code >= 0:
        return f"ended with {code} before its result was sent"
    memory = "; if nobody did it, the system had no memory left" if -code == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{memory}"


def _rank(rank: int, world: int, folder: str, pipe: Any, function: Callable[..., Any], arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    # Of a crash in C++ the stacks and what it printed are all there is.
    words = os.open(f"{folder}/words{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(words, 2)
    faulthandler.enable(words)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
        result = None, function(rank, world, *arguments)
        # Nobody hangs up while another still speaks.
        dist.barrier()
    except BaseException:
        result = time.monotonic(), traceback.format_exc()
    pipe.send(result)
    # Without destructors: those of process groups wait for ranks that may be gone.
    pipe.close()
    os._exit(0)
