"""The DiT's pipeline: one forward, one backward (PipeDream-Flush, arXiv 2006.09503), and the time its stages wait."""

from collections.abc import Iterator

from wemmu.config.stage import Rung
from wemmu.planning.backbones import Sana
from wemmu.planning.flops import Sample, Work
from wemmu.planning.parameters import dit_block, dit_ends

# (whether backward, number of the micro-batch)
Slot = tuple[bool, int]


def blocks_of(layers: int, place: int, stages: int) -> int:
    """Blocks of the stage at `place`, as `wemmu.backbones.sana.adapter.DiTStage` cuts them."""
    return layers * (place + 1) // stages - layers * place // stages


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


def idle_share(slots: list[tuple[float, float]], micro_batches: int) -> float:
    """The share of a round in which a stage waits for another, over all stages.

    slots: time of a forward and of a backward slot of each stage; what is sent takes none.
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


def stage_flops(c: Sana, sample: Sample, stage: Rung, stages: int) -> list[tuple[float, float]]:
    """FLOPs forward and backward of each stage of the whole DiT for one sample of `stage`, which trains it or not."""
    block, ends = dit_block(c), dit_ends(c)
    one = 2.0 * (sample.latents * block.latent.products + sample.queries * block.condition.products)
    attention = 4.0 * sample.latents * (c.width * (c.attention_head_dim + 1) + sample.queries * c.cross_width)
    out = 2.0 * sample.latents * c.width * (c.out_channels or c.in_channels) * c.patch_size**2
    first = 2.0 * (sample.latents * ends.latent.products + sample.queries * ends.condition.products) - out
    found = []
    for place in range(stages):
        blocks = blocks_of(c.num_layers, place, stages)
        work = Work(one * blocks + first * (place == 0) + out * (place == stages - 1), attention * blocks)
        found.append((work.forward, work.backward("dit" in stage.trains, passed=True)))
    return found
