"""Bytes that one rank exchanges with others in an optimizer step, by collective.

They are those of the whole tensors: of what is gathered, reduced or scattered, once. Of a gathering or scattering in a
ring over n ranks (n - 1) / n of them cross a rank's link, of an all-reduce twice as many. Exchanges of single numbers
(the norm, the losses) are left out. benchmarks/at_scale.py counts the same on the engines themselves.
"""

from collections import Counter

from wemmu.planning import padding
from wemmu.planning.backbones import Sizes
from wemmu.planning.flops import Sample
from wemmu.planning.load import BRIDGE, FP32, LIVE, Load
from wemmu.planning.parameters import dit_block, dit_ends
from wemmu.planning.schedule import blocks_of, order

Traffic = Counter[tuple[str, int]]  # (collective, ranks) -> bytes


def busiest(load: Load) -> dict[str, float]:
    """Bytes by "collective over ranks", of the rank with most: of all stages of the DiT's pipeline."""
    return max((traffic(load, place) for place in range(load.degrees.pp)), key=lambda sent: sum(sent.values()))


def traffic(load: Load, place: int) -> dict[str, float]:
    """Bytes by "collective over ranks", of a rank with stage `place` of the DiT's pipeline."""
    if load.degrees.split:
        sample = max(load.samples, key=lambda sample: sample.queries)
        found = _bridge(load) + _boundary(load, sample) + _dit(load, sample, place)
    else:
        found = _zero3(load)
    return {
        f"{kind} over {ranks}": load.accumulation * number
        for (kind, ranks), number in found.items()
        if ranks > 1 and number
    }


def _zero3(load: Load) -> Traffic:
    """Every weight forward and again backward, but for those that are still there; gradients in float32."""
    sharded = load.bridge + load.parameters["dit"]
    trained = sum(load.parameters[part] for part in load.stage.trains)
    gathered, world = load.width * (2 * sharded - min(sharded, LIVE)), load.degrees.world
    return Counter({("all_gather", world): gathered, ("reduce_scatter", world): FP32 * trained})


def _bridge(load: Load) -> Traffic:
    """Layers forward and again backward; what is in none of them stays gathered in between."""
    world, more = load.degrees.world, load.padding["pathway"]
    layers = load.layer * load.layers + more
    more += load.padding["position_mlp"]
    whole = load.bridge + more
    trained = sum(load.parameters[part] for part in load.stage.trains if part in BRIDGE)
    reduced = FP32 * (trained and trained + more)
    return Counter({("all_gather", world): load.width * (whole + layers), ("reduce_scatter", world): reduced})


def _boundary(load: Load, sample: Sample) -> Traffic:
    """Conditions with the points at which the velocity is asked for, to all; gradients of the conditions, back."""
    group, dit = load.degrees.tp * load.degrees.pp, load.sizes.dit
    states = load.width * sample.queries * dit.caption_channels
    # x_t and v, and the velocity of the contrastive partner.
    fields = 3 if load.stage.objective.kind == "contrastive" else 2
    points = FP32 * fields * sample.latents * dit.patch_size**2 * dit.in_channels
    samples = group * load.micro
    return Counter({("all_gather", group): samples * (states + points), ("scatter", group): samples * states})


def _dit(load: Load, sample: Sample, place: int) -> Traffic:
    """One round of the pipeline, of as many micro-batches as a DiT has ranks."""
    c, degrees, number = load.sizes.dit, load.degrees, load.width * load.micro
    last, trained, rounds = place == degrees.pp - 1, "dit" in load.stage.trains, degrees.tp * degrees.pp
    blocks, block = blocks_of(c.num_layers, place, degrees.pp), dit_block(c, degrees.tp)
    slots = list(order(place, degrees.pp, rounds))
    # Forward leaves a block sharded behind it, backward leaves it whole until its next forward.
    gathers = sum(i == 0 or not slots[i - 1][0] for i in range(len(slots)))
    held = blocks * (block.parameters + padding.added(padding.dit_block(c, degrees.tp), degrees.dp))
    ends = _ends(load.sizes, place, last) + padding.added(padding.dit_ends(c, place == 0, last), degrees.dp)
    found: Traffic = Counter({("all_gather", degrees.dp): load.width * (gathers * held + ends)})
    found["reduce_scatter", degrees.dp] = FP32 * (held + ends) * trained

    tokens, condition = (number * n * c.width for n in (sample.latents, sample.queries))
    # Forward what leaves the two attentions and the feed-forward, backward what enters them; before the first
    # cross-attention of a frozen DiT there is nothing that wants a gradient.
    reduced = blocks * (6 * tokens + condition) - 2 * tokens * (place == 0 and not trained)
    again = 3 * blocks * tokens * load.curriculum.memory.checkpointing
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
