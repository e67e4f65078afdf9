"""The DiT's pipeline: one forward, one backward (PipeDream-Flush, arXiv 2006.09503), and how long its stages wait."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Slot(NamedTuple):
    """Forward or backward of one micro-batch through one stage of a pipeline; it takes as long as its FLOPs."""

    backward: bool
    micro_batch: int
    flops: float


def order(place: int, stages: int, micro_batches: int, flops: Sequence[float] = (0, 0)) -> Iterator[Slot]:
    """Yield the slots of the stage at `place` in one round of `micro_batches`, at least as many as there are stages.

    Torch's way: as many forward as there are stages from here on, then backward and forward by turns. flops: of a
    forward and of a backward slot.
    """
    ahead = min(micro_batches, stages - place)
    yield from (Slot(False, i, flops[False]) for i in range(ahead))
    for i in range(micro_batches):
        yield Slot(True, i, flops[True])
        if ahead + i < micro_batches:
            yield Slot(False, ahead + i, flops[False])


def idle_share(stages: Sequence[Sequence[Slot]]) -> float:
    """Return the share of a round in which a stage waits for another, over all stages.

    stages: the slots of each, in its own order. A slot begins when its stage is free and what it needs has come from
    the stage before (forward) or behind (backward); sending takes no time.
    """
    ends: dict[tuple[int, bool, int], float] = {}
    now, left = [0.0] * len(stages), [list(slots) for slots in stages]
    while any(left):
        before = len(ends)
        for place, slots in enumerate(left):
            while slots:
                backward, number, flops = slots[0]
                needed = (place + 1 if backward else place - 1, backward, number)
                if 0 <= needed[0] < len(stages) and needed not in ends:
                    break
                now[place] = ends[place, backward, number] = max(now[place], ends.get(needed, 0.0)) + flops
                slots.pop(0)
        assert len(ends) > before, "the stages wait for each other"
    return 1 - sum(slot.flops for slots in stages for slot in slots) / (len(stages) * max(now))
