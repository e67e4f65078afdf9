"""Collective work on a checkpoint: it succeeds on all ranks or fails on all ranks."""

from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch.distributed as dist

from wemmu.locks import LockedError

T = TypeVar("T")
R = TypeVar("R")

# A dead rank is noticed at once by its connection; a slow disk may take longer.
PATIENCE = timedelta(hours=2)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or used; the message names the directory, the reason and what to do."""


class Ranks:
    """The ranks that save and load together, or this process alone (`group` None).

    They use a gloo group of their own, which no other thread uses: they exchange only file names and results.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group
        self.rank, self.world = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)

    def together(self, what: str, work: Callable[[], T], judge: Callable[[list[T]], R]) -> R:
        """Run `work` on every rank and `judge` on the first one; return its verdict on all ranks.

        Raises:
            CheckpointError: on all ranks, if the work of one or the judgement failed: "`what`: rank 1: the reason".
                This process alone raises what was raised.
        """
        if self.group is None:
            return judge([work()])
        result, failure, cause = None, None, None
        try:
            result = work()
        except Exception as error:
            failure, cause = _reason(error), error
        results: list[Any] | None = [None] * self.world if self.rank == 0 else None
        dist.gather_object((result, failure), results, dst=0, group=self.group)
        verdict: list[Any] = [None]
        if results is not None:
            failures = [f"rank {rank}: {said}" for rank, (_, said) in enumerate(results) if said is not None]
            try:
                verdict = [(None, "; ".join(failures)) if failures else (judge([r for r, _ in results]), None)]
            except Exception as error:
                verdict, cause = [(None, _reason(error))], error
        dist.broadcast_object_list(verdict, src=0, group=self.group)
        judged: R
        judged, failure = verdict[0]
        if failure is not None:
            raise CheckpointError(f"{what}: {failure}") from cause
        return judged

    def answers(self, own: T) -> list[T]:
        """Return what every rank says, in their order; all ranks must call it."""
        return self.together("the ranks could not tell each other what they found", lambda: own, list)


ALONE = Ranks(None)


def own_group() -> Ranks:
    """Create a new group of all ranks; all ranks must call this in the same order, in their main threads."""
    return Ranks(dist.new_group(backend="gloo", timeout=PATIENCE)) if dist.is_initialized() else ALONE


def all_ranks() -> Ranks:
    """Return the group of all ranks that the main threads share."""
    return _of(dist.group.WORLD) if dist.is_initialized() else ALONE


@cache
def _of(_: dist.ProcessGroup) -> Ranks:
    return own_group()


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, (CheckpointError, LockedError)) else f"{type(error).__name__}: {error}"
