"""Bytes that one rank holds, by part, and that a checkpoint takes.

The VLM and the VAE are whole on every rank, in the type of the backbones; the bridge lies sharded over all ranks
(ZeRO-3, arXiv 1910.02054), the DiT over those that hold the same part of it. The fullest rank is meant: with pipelining
one of the first stage, which has several micro-batches of the DiT under way. What a step keeps for its backward pass is
counted as autograd counts it, tensor by tensor, for the code as it runs here (tests/planning measures it); kernels that
fuse need less. What comes and goes within a step is counted at each time at which it may be most (`Moment`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wemmu.config.schema import Curriculum
from wemmu.config.stage import Rung, Stage
from wemmu.planning import padding
from wemmu.planning.backbones import Sana, Sizes
from wemmu.planning.flops import Sample
from wemmu.planning.parameters import Part, dit_block, language_layer, tensor_widths

FP32 = 4
BRIDGE: tuple[Part, ...] = ("pathway", "vae_branch", "queries", "position_mlp")
# AdamW keeps two numbers in fp32 for each that it trains.
MOMENTS = 2 * FP32
# Resident after the imports of `wemmu.train`, 0.9 GB on a CPU; CUDA's own libraries come on top.
LIBRARIES = 2e9
# Feature maps of the VAE's largest block that exist at one time: its input, the second convolution's and the norm's in
# the type of the backbones, and two more in fp32 inside the norm.
ENCODER_MAPS, ENCODER_MAPS_FP32 = 3, 2
# Elements, as `wemmu.parallel.zero3` has them: ZeRO-3 keeps so many gathered, and reduces gradients in such buckets.
LIVE = 1_000_000_000
BUCKET = 50_000_000


@dataclass(frozen=True)
class Degrees:
    """Ranks in all, each with samples of its own; tensor and pipeline parallel degree of the DiT; copies of the DiT."""

    world: int
    tp: int
    pp: int

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.pp)

    def shards(self, part: Part) -> int:
        """Ranks over which what a rank has of a part is sharded."""
        if part == "dit":
            return self.dp
        return self.world if part in BRIDGE else 1


@dataclass(frozen=True)
class Step:
    """What a rank does at once: `micro` samples, and so many micro-batches (`accumulation`) for each step."""

    micro: int
    accumulation: int
    samples: Sequence[Sample]


def weight_bytes(curriculum: Curriculum) -> int:
    """Bytes of a number in frozen and in working weights."""
    return {"float32": 4, "bfloat16": 2}[curriculum.backbones.dtype]


@dataclass(frozen=True)
class Moment:
    """Bytes that there are at one time of a step, beside what a rank always holds.

    gathered: whole weights, and buffers of all-gathers. gradients: whole, and buffers of reduce-scatters. activations:
    what is kept for the backward pass, or is there while something is computed.
    """

    gathered: float = 0.0
    gradients: float = 0.0
    activations: float = 0.0

    @property
    def total(self) -> float:
        return self.gathered + self.gradients + self.activations


def states(
    parameters: Mapping[Part, int], sizes: Sizes, curriculum: Curriculum, stage: Rung, degrees: Degrees
) -> dict[str, float]:
    """Bytes that a rank holds throughout a step."""
    width, hybrid = weight_bytes(curriculum), degrees.tp * degrees.pp > 1
    share = rank_parameters(parameters, sizes, degrees)
    more = _padding(sizes, curriculum, degrees)
    sharded = {part: (number + more.get(part, 0)) / degrees.shards(part) for part, number in share.items()}
    trained = sum(sharded[part] for part in stage.trains)
    resting = {part: number for part, number in sharded.items() if part not in stage.trains}
    # FSDP2's shards are float32, those of a frozen DiT, too; ZeRO-3 has them in the working type, with float32 masters
    # of what is trained. Weights in fp32 are their own.
    frozen = sum(number * (FP32 if hybrid and part in ("dit", *BRIDGE) else width) for part, number in resting.items())
    working = FP32 if hybrid else width
    # ZeRO-3 has its bucket from the start.
    bucket = BUCKET * (degrees.world > 1 and not hybrid)
    return {
        "frozen weights": frozen,
        "working weights": working * trained,
        "master weights": (FP32 - working) and FP32 * trained,
        "moments": MOMENTS * trained,
        "gradients": FP32 * (trained + bucket),
    }


def moments(
    parameters: Mapping[Part, int],
    sizes: Sizes,
    curriculum: Curriculum,
    stage: Rung,
    degrees: Degrees,
    step: Step,
    checkpointing: bool,
) -> dict[str, Moment]:
    """What the fullest GPU holds beside its states, at each time of a step at which that may be most.

    The VAE encodes before anything is gathered, or kept for the backward pass.
    """
    width = weight_bytes(curriculum)
    share, more = rank_parameters(parameters, sizes, degrees), _padding(sizes, curriculum, degrees)
    gathered = width * (_gathered(parameters, share, sizes, degrees) + more.get("position_mlp", 0))
    kept = max(activations(s, sizes, stage, degrees, step, width, checkpointing) for s in step.samples)
    found = {
        "VAE at work": Moment(activations=step.micro * max(encoding(s, sizes, width) for s in step.samples)),
        "end of forward": Moment(gathered, _whole_gradients(share, stage, degrees), kept),
    }
    if degrees.tp * degrees.pp > 1:
        backward = bridge_backward(parameters, sizes, curriculum, stage, degrees, step, checkpointing)
        found["backward of the bridge"] = backward
    return found


def gpu(held: Mapping[str, float], kept: Mapping[str, Moment], checkpointed: Mapping[str, Moment]) -> dict[str, float]:
    """Bytes on the fullest GPU, by part: its states, and its moments without and with checkpointing."""
    parts = {
        **held,
        "gathered": kept["end of forward"].gathered,
        "activations": kept["end of forward"].activations,
        "checkpointed activations": checkpointed["end of forward"].activations,
        "VAE at work": kept["VAE at work"].total,
    }
    if "backward of the bridge" in kept:
        parts["whole gradients"] = kept["end of forward"].gradients
        parts["backward of the bridge"] = kept["backward of the bridge"].total
        parts["checkpointed backward of the bridge"] = checkpointed["backward of the bridge"].total
    return parts


def fullest(moments: Mapping[str, Moment]) -> Moment:
    """The one with most bytes."""
    return max(moments.values(), key=lambda moment: moment.total)


def _padding(sizes: Sizes, curriculum: Curriculum, degrees: Degrees) -> dict[Part, int]:
    """Numbers that FSDP2 adds to the parts that it shards, all of it (one tensor rank's first stage of the DiT)."""
    if degrees.tp * degrees.pp == 1:
        return {}
    blocks = math.ceil(sizes.dit.num_layers / degrees.pp)
    block = padding.added(padding.dit_block(sizes.dit, degrees.tp), degrees.dp)
    layer = padding.added(padding.language_layer(sizes.language), degrees.world)
    return {
        "pathway": layer * sizes.language.num_hidden_layers,
        "position_mlp": padding.added(padding.rest_of_bridge(sizes, curriculum.bridge), degrees.world),
        "dit": block * blocks + padding.added(padding.dit_ends(sizes.dit, True, degrees.pp == 1), degrees.dp),
    }


def _whole_gradients(share: Mapping[Part, int], stage: Rung, degrees: Degrees) -> float:
    """Bytes of a DiT's gradients that torch's pipeline sums whole, for a round."""
    split = degrees.tp * degrees.pp > 1
    return float(FP32 * share["dit"] * (split and "dit" in stage.trains and degrees.dp > 1))


def _gathered(parameters: Mapping[Part, int], share: Mapping[Part, int], sizes: Sizes, degrees: Degrees) -> float:
    """Numbers of weights that are whole where most is kept: at the end of a forward pass.

    ZeRO-3 keeps the last ones for the backward pass that begins. FSDP2 has freed all layers and blocks but the last,
    and keeps what is in none.
    """
    bridge = sum(parameters[part] for part in BRIDGE)
    if degrees.world == 1:
        return 0
    if degrees.tp * degrees.pp == 1:
        return min(LIVE, bridge + parameters["dit"])
    layers = language_layer(sizes.language).parameters * sizes.language.num_hidden_layers
    block = dit_block(sizes.dit, degrees.tp).parameters
    ends = share["dit"] - block * math.ceil(sizes.dit.num_layers / degrees.pp)
    return bridge - layers + (ends + block) * (degrees.dp > 1)


def bridge_backward(
    parameters: Mapping[Part, int],
    sizes: Sizes,
    curriculum: Curriculum,
    stage: Rung,
    degrees: Degrees,
    step: Step,
    checkpointing: bool,
) -> Moment:
    """The fullest moment as FSDP2 goes back through the pathway's layers; the DiT has been gone through.

    Either a layer is half through, and the gradients of the layer behind it are in a buffer; or a layer ends, and its
    own are copied into another, where the former is not yet let go of. Later layers have as much, and less is kept.
    A pathway that is not trained holds nothing of this.
    """
    if "pathway" not in stage.trains:
        return Moment()
    last = min(2, sizes.language.num_hidden_layers - 1)
    found = [
        _layer_backward(parameters, sizes, curriculum, stage, degrees, step, checkpointing, done, midway)
        for done, midway in ((0, True), (1, True), (1, False), (2, False))
        if done <= last
    ]
    return max(found, key=lambda moment: moment.total)


def _layer_backward(
    parameters: Mapping[Part, int],
    sizes: Sizes,
    curriculum: Curriculum,
    stage: Rung,
    degrees: Degrees,
    step: Step,
    checkpointing: bool,
    done: int,
    midway: bool,
) -> Moment:
    """Where so many layers are gone through, and the next one is `midway`, else the last of them is being reduced.

    Gathered are what is in no layer, a buffer with the layer that comes next and, midway, a layer's own weights. Of
    gradients there are: a buffer in fp32, padded as the shards are, for each layer that is gone through, for two at
    most (FSDP2 of torch 2.12 fills the second before it lets go of the first, which a loop variable holds); in the
    working type, those of the layer that is being reduced, or midway of its MLP's last projection, and those of the
    position MLP, which wait for the rest of the bridge. Activations are those of layers that are left, with
    checkpointing a layer's that is computed again, and midway the gradients [tokens, hidden] of silu(gate), of up and
    of their product, which is no longer kept itself.
    """
    width, c = weight_bytes(curriculum), sizes.language
    more = _padding(sizes, curriculum, degrees)
    layer = language_layer(c).parameters
    padded = layer + more["pathway"] / c.num_hidden_layers
    rest = sum(parameters[part] for part in BRIDGE) - layer * c.num_hidden_layers + more["position_mlp"]
    whole = c.intermediate_size * c.hidden_size if midway else layer
    waiting = parameters["position_mlp"] * ("position_mlp" in stage.trains)

    def kept(sample: Sample) -> float:
        left = pathway_kept(sample, sizes, width, checkpointing) * (c.num_hidden_layers - done)
        again = pathway_kept(sample, sizes, width, False) * checkpointing
        return left + (again + (3 - 1) * width * sample.pathway * c.intermediate_size) * midway

    return Moment(
        gathered=width * (rest + padded * (1 + midway)),
        gradients=FP32 * padded * done + width * (whole + waiting),
        activations=step.micro * max(map(kept, step.samples)),
    )


def rank_parameters(parameters: Mapping[Part, int], sizes: Sizes, degrees: Degrees) -> dict[Part, int]:
    """Parameters that the first pipeline stage of one tensor rank has a part in, padding among them."""
    ends = parameters["dit"] - dit_block(sizes.dit).parameters * sizes.dit.num_layers
    blocks = math.ceil(sizes.dit.num_layers / degrees.pp)
    return {**parameters, "dit": ends + dit_block(sizes.dit, degrees.tp).parameters * blocks}


def activations(
    sample: Sample, sizes: Sizes, stage: Rung, degrees: Degrees, step: Step, width: int, checkpointing: bool
) -> float:
    """Bytes kept for the backward pass on the first pipeline stage.

    The bridge has one micro-batch under way, the DiT as many as there are stages.
    """
    dit, language = sizes.dit, sizes.language
    bridge = bool(set(stage.trains) - {"dit"})
    blocks = math.ceil(dit.num_layers / degrees.pp)
    layers = pathway_kept(sample, sizes, width, checkpointing) * language.num_hidden_layers * bridge
    block = dit_block_kept(sample, dit, width, "dit" in stage.trains, degrees.tp)
    mlp = width * sample.queries * (language.hidden_size + 4 * dit.caption_channels) * bridge
    ends = width * dit.width * (7 * sample.queries + 4 * sample.latents)
    if checkpointing:
        # The input of every block, and one layer or block as it is computed again.
        again = max(pathway_kept(sample, sizes, width, False) * bridge, block)
        return step.micro * (layers + mlp + degrees.pp * (width * sample.latents * dit.width * blocks + ends) + again)
    return step.micro * (layers + mlp + degrees.pp * (block * blocks + ends))


def pathway_kept(sample: Sample, sizes: Sizes, number: int, checkpointing: bool) -> float:
    """Bytes that a layer of the pathway keeps until it is gone back through; `number` bytes a number.

    With checkpointing its input, and the prefix's keys and values.
    """
    c = sizes.language
    if checkpointing:
        return number * (sample.pathway * c.hidden_size + 2 * sample.prefix * c.kv_width)
    return pathway_layer(sample.pathway, sample.prefix, c.hidden_size, c.intermediate_size, number)


def pathway_layer(tokens: int, prefix: int, width: int, hidden: int, number: int) -> float:
    """Bytes that one layer of the pathway keeps for `tokens` that look at `prefix` more; `number` bytes a number.

    Inputs of q, k, v and of the MLP with their norms' outputs (4), q, attention's output and its transpose (3); two
    norms' inputs in fp32; gate, silu(gate), up and their product; keys and values of all, repeated for every head, as
    they are where prompts are padded.
    """
    own = tokens * (number * (7 * width + 4 * hidden) + 2 * FP32 * width)
    return own + 2.0 * number * (prefix + tokens) * width


def dit_block_kept(sample: Sample, c: Sana, number: int, trained: bool, tp: int) -> float:
    """Bytes that one block of Sana keeps on one of `tp` tensor ranks.

    Of the width 9 tensors that all these ranks have alike, and 6 of a rank's own heads; 7 fewer of the former without
    gradients of weights. q, k, v and the output of linear attention, which works in fp32; two halves three times and
    their product twice in the feed-forward; keys and values of the condition; the linear attention's [head + 1, head]
    for each head, in fp32.
    """
    own, cross, hidden = tensor_widths(c, tp)
    alike = number * (9 if trained else 2) * c.width
    parts = number * (6 * own + 8 * hidden) + 4 * FP32 * own
    once = FP32 * own * (c.attention_head_dim + 1)
    return sample.latents * (alike + parts) + 2.0 * number * sample.queries * cross + once


def encoding(sample: Sample, sizes: Sizes, number: int) -> float:
    """Bytes of the VAE's feature maps where they are largest, for one picture of each kind."""
    vae = sizes.vae
    widths, depths = vae.encoder_block_out_channels, vae.encoder_layers_per_block
    numbers_per_pixel = max(width / 4.0**i for i, width in enumerate(widths) if depths[i])
    bytes_per_number = ENCODER_MAPS * number + ENCODER_MAPS_FP32 * FP32
    return bytes_per_number * numbers_per_pixel * max((side**2 for side in sample.encoded), default=0)


def host(
    parameters: Mapping[Part, int], sizes: Sizes, curriculum: Curriculum, stage: Rung, degrees: Degrees, step: Step
) -> dict[str, float]:
    """Bytes of host memory of one rank."""
    width = weight_bytes(curriculum)
    share = rank_parameters(parameters, sizes, degrees)
    trained = sum(share[part] / degrees.shards(part) for part in stage.trains)
    # DeepSpeed's engine shards each block as it is read; a DiT that is split is read whole and then cut.
    split = degrees.tp * degrees.pp > 1
    whole = sum(number / (1 if split else degrees.shards(part)) for part, number in parameters.items())
    pictures = max(1 + sample.pictures for sample in step.samples)
    micro_batches = step.accumulation * (1 + curriculum.data.workers)
    side, latents = stage.resolution // sizes.vision.token_px, (stage.resolution // sizes.vae.latent_px) ** 2
    features = latents * sizes.vae.latent_channels + side**2 * sizes.vision.out_hidden_size
    return {
        "libraries": LIBRARIES,
        # Before anything goes to the GPU.
        "weights while loading": float(width * whole),
        "checkpoint on its way out": (FP32 + MOMENTS) * trained,
        "pictures read ahead": float(micro_batches * step.micro * pictures * 3 * stage.resolution**2),
        "features remembered": float(curriculum.memory.cached_pictures * features * width),
    }


def host_total(memory: Mapping[str, float]) -> float:
    """The peak: weights are on the GPU before the first batch is read."""
    loading = memory["weights while loading"]
    running = sum(v for name, v in memory.items() if name not in ("libraries", "weights while loading"))
    return memory["libraries"] + max(loading, running)


def checkpoint(
    parameters: Mapping[Part, int], curriculum: Curriculum, stage: Stage | Rung, earlier: Sequence[Stage]
) -> float:
    """Bytes on disk: weights and moments of what is trained in fp32, and what is only carried, as it is in memory.

    Carried are parts of the bridge that this stage leaves alone, and the DiT once an earlier stage has trained it.
    """
    carried = {"pathway", "vae_branch", "queries", "position_mlp"} - set(stage.trains)
    if "dit" not in stage.trains and any("dit" in one.trains for one in earlier):
        carried |= {"dit"}
    trained = sum(parameters[part] for part in stage.trains)
    return (FP32 + MOMENTS) * trained + weight_bytes(curriculum) * sum(
        number for part, number in parameters.items() if part in carried
    )
