"""Bytes that one rank exchanges with others in an optimizer step, by collective.

They are those of the whole tensors: of what is gathered, reduced or scattered, once. Of a gathering or scattering in a
ring over n ranks (n - 1) / n of them cross a rank's link, of an all-reduce twice as many. Exchanges of single numbers
(the norm, the losses) are left out. benchmarks/at_scale.py counts the same on the engines themselves.
"""

from collections import Counter

from wemmu.planning import padding
from wemmu.planning.backbones import Sizes
from wemmu.planning.flops import Sample
from wemmu.planning.parameters import dit_block, dit_ends
from wemmu.planning.schedule import blocks_of, order
from wemmu.planning.work import BRIDGE, FP32, LIVE, Work

Traffic = Counter[tuple[str, int]]  # (collective, ranks) -> bytes


def busiest(work: Work) -> dict[str, float]:
    """Bytes by "collective over ranks", of the rank with most: of all stages of the DiT's pipeline."""
    return max((traffic(work, place) for place in range(work.degrees.pp)), key=lambda sent: sum(sent.values()))


def traffic(work: Work, place: int) -> dict[str, float]:
    """Bytes by "collective over ranks", of a rank with stage `place` of the DiT's pipeline."""
    if work.degrees.split:
        sample = max(work.samples, key=lambda sample: sample.queries)
        found = _bridge(work) + _boundary(work, sample) + _dit(work, sample, place)
    else:
        found = _zero3(work)
    return {
        f"{kind} over {ranks}": work.accumulation * number
        for (kind, ranks), number in found.items()
        if ranks > 1 and number
    }


def _zero3(work: Work) -> Traffic:
    """Every weight forward and again backward, but for those that are still there; gradients in float32."""
    sharded = sum(work.parameters[part] for part in (*BRIDGE, "dit"))
    trained = sum(work.parameters[part] for part in work.stage.trains)
    gathered, world = work.width * (2 * sharded - min(sharded, LIVE)), work.degrees.world
    return Counter({("all_gather", world): gathered, ("reduce_scatter", world): FP32 * trained})


def _bridge(work: Work) -> Traffic:
    """Layers forward and again backward; what is in none of them stays gathered in between."""
    world, more = work.degrees.world, work.padding["pathway"]
    layers = work.layer * work.layers + more
    more += work.padding["position_mlp"]
    whole = sum(work.parameters[part] for part in BRIDGE) + more
    trained = sum(work.parameters[part] for part in work.stage.trains if part in BRIDGE)
    reduced = FP32 * (trained and trained + more)
    return Counter({("all_gather", world): work.width * (whole + layers), ("reduce_scatter", world): reduced})


def _boundary(work: Work, sample: Sample) -> Traffic:
    """Conditions with the points at which the velocity is asked for, to all; gradients of the conditions, back."""
    group, dit = work.degrees.tp * work.degrees.pp, work.sizes.dit
    states = work.width * sample.queries * dit.caption_channels
    # x_t and v, and the velocity of the contrastive partner.
    fields = 3 if work.stage.objective.kind == "contrastive" else 2
    points = FP32 * fields * sample.latents * dit.patch_size**2 * dit.in_channels
    samples = group * work.micro
    return Counter({("all_gather", group): samples * (states + points), ("scatter", group): samples * states})


def _dit(work: Work, sample: Sample, place: int) -> Traffic:
    """One round of the pipeline, of as many micro-batches as a DiT has ranks."""
    c, degrees, number = work.sizes.dit, work.degrees, work.width * work.micro
    last, trained, rounds = place == degrees.pp - 1, "dit" in work.stage.trains, degrees.tp * degrees.pp
    blocks, block = blocks_of(c.num_layers, place, degrees.pp), dit_block(c, degrees.tp)
    slots = list(order(place, degrees.pp, rounds))
    # Forward leaves a block sharded behind it, backward leaves it whole until its next forward.
    gathers = sum(i == 0 or not slots[i - 1][0] for i in range(len(slots)))
    held = blocks * (block.parameters + padding.added(padding.dit_block(c, degrees.tp), degrees.dp))
    ends = _ends(work.sizes, place, last) + padding.added(padding.dit_ends(c, place == 0, last), degrees.dp)
    found: Traffic = Counter({("all_gather", degrees.dp): work.width * (gathers * held + ends)})
    found["reduce_scatter", degrees.dp] = FP32 * (held + ends) * trained

    tokens, condition = (number * n * c.width for n in (sample.latents, sample.queries))
    # Forward what leaves the two attentions and the feed-forward, backward what enters them; before the first
    # cross-attention of a frozen DiT there is nothing that wants a gradient.
    reduced = blocks * (6 * tokens + condition) - 2 * tokens * (place == 0 and not trained)
    again = 3 * blocks * tokens * work.curriculum.memory.checkpointing
    found["all_reduce", degrees.tp] = rounds * (reduced + again)
    # The time's modulation of the blocks and its embedding go with the tokens.
    passed = rounds * (tokens + condition + number * 7 * c.width)
    found["send", degrees.pp] = found["receive", degrees.pp] = passed * ((place > 0) + (not last))
    return found


def _ends(sizes: Sizes, place: int, last: bool) -> int:
    """Parameters of a stage that are in none of its blocks."""
    c = sizes.dit
    out = (c.width + 1) * (c.out_channels or c.in_channels) * c.patch_size**2 + 2 * c.width
    return (dit_ends(c).parameters - out) * (place == 0) + out * last
