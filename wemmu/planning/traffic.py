"""Bytes that one rank exchanges with others in an optimizer step, by collective.

They are those of the whole tensors: of what is gathered, reduced or scattered, once. Of a gathering or scattering in a
ring over n ranks (n - 1) / n of them cross a rank's link, of an all-reduce twice as many. Exchanges of single numbers
(the norm, the losses) are left out. benchmarks/at_scale.py counts the same on the engines themselves.
"""

from collections import Counter
from collections.abc import Mapping

from wemmu.config.schema import Curriculum
from wemmu.config.stage import Rung
from wemmu.planning import padding
from wemmu.planning.backbones import Sizes
from wemmu.planning.flops import Sample
from wemmu.planning.memory import BRIDGE, FP32, LIVE, Degrees, Step, weight_bytes
from wemmu.planning.parameters import Part, dit_block, dit_ends, language_layer
from wemmu.planning.schedule import blocks_of, order


def busiest(
    parameters: Mapping[Part, int], sizes: Sizes, curriculum: Curriculum, stage: Rung, degrees: Degrees, step: Step
) -> dict[str, float]:
    """Bytes by "collective over ranks", of the rank with most: of all stages of the DiT's pipeline."""
    places = [traffic(parameters, sizes, curriculum, stage, degrees, step, place) for place in range(degrees.pp)]
    return max(places, key=lambda sent: sum(sent.values()))


def traffic(
    parameters: Mapping[Part, int],
    sizes: Sizes,
    curriculum: Curriculum,
    stage: Rung,
    degrees: Degrees,
    step: Step,
    place: int,
) -> dict[str, float]:
    """Bytes by "collective over ranks", of a rank with stage `place` of the DiT's pipeline."""
    width = weight_bytes(curriculum)
    if degrees.tp * degrees.pp == 1:
        found = _zero3(parameters, stage, degrees, width)
    else:
        sample = max(step.samples, key=lambda sample: sample.queries)
        found = _bridge(parameters, sizes, curriculum, stage, degrees, width)
        found += _boundary(sample, sizes, stage, degrees, step.micro, width)
        found += _dit(sample, sizes, curriculum, stage, degrees, step.micro, place, width)
    return {
        f"{kind} over {ranks}": step.accumulation * number
        for (kind, ranks), number in found.items()
        if ranks > 1 and number
    }


Traffic = Counter[tuple[str, int]]  # (collective, ranks) -> bytes


def _zero3(parameters: Mapping[Part, int], stage: Rung, degrees: Degrees, width: int) -> Traffic:
    """Every weight forward and again backward, but for those that are still there; gradients in float32."""
    sharded = sum(parameters[part] for part in (*BRIDGE, "dit"))
    trained = sum(parameters[part] for part in stage.trains)
    gathered = width * (2 * sharded - min(sharded, LIVE))
    return Counter({("all_gather", degrees.world): gathered, ("reduce_scatter", degrees.world): FP32 * trained})


def _bridge(
    parameters: Mapping[Part, int], sizes: Sizes, curriculum: Curriculum, stage: Rung, degrees: Degrees, width: int
) -> Traffic:
    """Layers forward and again backward; what is in none of them stays gathered in between."""
    whole = sum(parameters[part] for part in BRIDGE)
    number, language = sizes.language.num_hidden_layers, sizes.language
    trained = sum(parameters[part] for part in stage.trains if part in BRIDGE)
    more = number * padding.added(padding.language_layer(language), degrees.world)
    layers = language_layer(language).parameters * number + more
    more += padding.added(padding.rest_of_bridge(sizes, curriculum.bridge), degrees.world)
    whole, trained = whole + more, trained and trained + more
    return Counter(
        {("all_gather", degrees.world): width * (whole + layers), ("reduce_scatter", degrees.world): FP32 * trained}
    )


def _boundary(sample: Sample, sizes: Sizes, stage: Rung, degrees: Degrees, micro: int, width: int) -> Traffic:
    """Conditions with the points at which the velocity is asked for, to all; gradients of the conditions, back."""
    group = degrees.tp * degrees.pp
    states = width * sample.queries * sizes.dit.caption_channels
    # x_t and v, and the velocity of the contrastive partner.
    fields = 3 if stage.objective.kind == "contrastive" else 2
    points = FP32 * fields * sample.latents * sizes.dit.patch_size**2 * sizes.dit.in_channels
    return Counter(
        {("all_gather", group): group * micro * (states + points), ("scatter", group): group * micro * states}
    )


def _dit(
    sample: Sample,
    sizes: Sizes,
    curriculum: Curriculum,
    stage: Rung,
    degrees: Degrees,
    micro: int,
    place: int,
    width: int,
) -> Traffic:
    """One round of the pipeline, of as many micro-batches as a DiT has ranks."""
    c, last = sizes.dit, place == degrees.pp - 1
    rounds, trained = degrees.tp * degrees.pp, "dit" in stage.trains
    blocks, block, ends = (
        blocks_of(c.num_layers, place, degrees.pp),
        dit_block(c, degrees.tp),
        _ends(sizes, place, last),
    )
    slots = list(order(place, degrees.pp, rounds))
    # Forward leaves a block sharded behind it, backward leaves it whole until its next forward.
    gathers = sum(i == 0 or not slots[i - 1][0] for i in range(len(slots)))
    held = blocks * (block.parameters + padding.added(padding.dit_block(c, degrees.tp), degrees.dp))
    ends += padding.added(padding.dit_ends(c, place == 0, last), degrees.dp)
    found: Traffic = Counter({("all_gather", degrees.dp): width * (gathers * held + ends)})
    found["reduce_scatter", degrees.dp] = FP32 * (held + ends) * trained

    tokens, condition = (width * micro * n * c.width for n in (sample.latents, sample.queries))
    # Forward what leaves the two attentions and the feed-forward, backward what enters them; before the first
    # cross-attention of a frozen DiT there is nothing that wants a gradient.
    reduced = blocks * (6 * tokens + condition) - 2 * tokens * (place == 0 and not trained)
    again = 3 * blocks * tokens * curriculum.memory.checkpointing
    found["all_reduce", degrees.tp] = rounds * (reduced + again)
    # The time's modulation of the blocks and its embedding go with the tokens.
    passed = rounds * (tokens + condition + width * micro * 7 * c.width)
    found["send", degrees.pp] = found["receive", degrees.pp] = passed * ((place > 0) + (not last))
    return found


def _ends(sizes: Sizes, place: int, last: bool) -> int:
    """Parameters of a stage that are in none of its blocks."""
    c = sizes.dit
    out = (c.width + 1) * (c.out_channels or c.in_channels) * c.patch_size**2 + 2 * c.width
    return (dit_ends(c).parameters - out) * (place == 0) + out * last
