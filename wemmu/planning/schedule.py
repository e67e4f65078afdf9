"""The DiT's pipeline: one forward, one backward (PipeDream-Flush, arXiv 2006.09503), and how long its stages wait."""

from collections.abc import Iterator, Sequence

# (whether backward, number of the micro-batch)
Slot = tuple[bool, int]


def order(place: int, stages: int, micro_batches: int) -> Iterator[Slot]:
    """What the stage at `place` does, in turn, for one round of `micro_batches`, at least as many as there are stages.

    Torch's way: as many forward as there are stages from here on, then backward and forward by turns.
    """
    ahead = min(micro_batches, stages - place)
    yield from ((False, i) for i in range(ahead))
    for i in range(micro_batches):
        yield True, i
        if ahead + i < micro_batches:
            yield False, ahead + i


def idle_share(slots: Sequence[Sequence[float]], micro_batches: int) -> float:
    """The share of a round in which a stage waits for another, over all stages.

    slots: time of a forward and of a backward slot of each stage; sending takes no time.
    """
    stages = len(slots)
    orders = [list(order(place, stages, micro_batches)) for place in range(stages)]
    ends: dict[tuple[int, bool, int], float] = {}
    now = [0.0] * stages
    while any(orders):
        for place, left in enumerate(orders):
            while left:
                backward, number = left[0]
                source = place + 1 if backward else place - 1
                if 0 <= source < stages and (source, backward, number) not in ends:
                    break
                start = max(now[place], ends.get((source, backward, number), 0.0))
                now[place] = ends[place, backward, number] = start + slots[place][backward]
                left.pop(0)
    return 1 - micro_batches * sum(map(sum, slots)) / (stages * max(now))
