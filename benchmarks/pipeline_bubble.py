"""The time that the stages of a pipeline wait for each other, from what each of them did."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """Forward or backward of one micro-batch through one stage of a pipeline."""

    backward: bool
    micro_batch: int
    flops: int


def idle_share(stages: list[list[Slot]]) -> float:
    """The share of time in which a stage of a pipeline waits, if every slot takes as long as its FLOPs.

    stages: the slots of each, in its own order. A slot begins when its stage is free and what it needs has come from
    the stage before (forward) or behind (backward).
    """
    ends: dict[tuple[int, bool, int], float] = {}
    now, nexts = [0.0] * len(stages), [0] * len(stages)
    while any(i < len(slots) for i, slots in zip(nexts, stages, strict=True)):
        moved = False
        for stage, slots in enumerate(stages):
            while nexts[stage] < len(slots):
                slot = slots[nexts[stage]]
                source = stage + 1 if slot.backward else stage - 1
                needed = (source, slot.backward, slot.micro_batch)
                if 0 <= source < len(stages) and needed not in ends:
                    break
                now[stage] = max(now[stage], ends.get(needed, 0.0)) + slot.flops
                ends[stage, slot.backward, slot.micro_batch] = now[stage]
                nexts[stage] += 1
                moved = True
        assert moved, "the stages wait for each other"
    return 1 - sum(slot.flops for slots in stages for slot in slots) / (len(stages) * max(now))
