"""What comes and goes within a step on the fullest GPU, at each time at which it may be most."""

from collections.abc import Iterable
from dataclasses import dataclass

from wemmu.planning.activations import activations, encoding, pathway_kept
from wemmu.planning.flops import Sample
from wemmu.planning.load import FP32, LIVE, Load
from wemmu.planning.parameters import dit_block


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


def moments(load: Load, checkpointing: bool) -> dict[str, Moment]:
    """What the fullest GPU holds beside its states, at each time of a step at which that may be most.

    The VAE encodes before anything is gathered, or kept for the backward pass.
    """
    width = load.width
    found = {
        "VAE at work": Moment(activations=load.micro * max(encoding(s, load.sizes.vae, width) for s in load.samples)),
        "end of forward": Moment(
            width * (_gathered(load) + load.padding.get("position_mlp", 0)),
            _whole_gradients(load),
            max(activations(sample, load, checkpointing) for sample in load.samples),
        ),
    }
    if load.degrees.split:
        found["backward of the bridge"] = _bridge_backward(load, checkpointing)
    return found


def fullest(moments: Iterable[Moment]) -> Moment:
    """The one with most bytes."""
    return max(moments, key=lambda moment: moment.total)


def _whole_gradients(load: Load) -> float:
    """Bytes of a DiT's gradients that torch's pipeline sums whole, for a round."""
    summed = load.degrees.split and "dit" in load.stage.trains and load.degrees.dp > 1
    return float(FP32 * load.share["dit"] * summed)


def _gathered(load: Load) -> float:
    """Numbers of weights that are whole where most is kept: at the end of a forward pass.

    ZeRO-3 keeps the last ones for the backward pass that begins. FSDP2 has freed all layers and blocks but the last,
    and keeps what is in none.
    """
    degrees = load.degrees
    if degrees.world == 1:
        return 0
    if not degrees.split:
        return min(LIVE, load.bridge + load.parameters["dit"])
    block = dit_block(load.sizes.dit, degrees.tp).parameters
    ends = load.share["dit"] - block * load.blocks
    return load.bridge - load.layer * load.layers + (ends + block) * (degrees.dp > 1)


def _bridge_backward(load: Load, checkpointing: bool) -> Moment:
    """The fullest moment as FSDP2 goes back through the pathway's layers; the DiT has been gone through.

    Either a layer is half through, and the gradients of the layer behind it are in a buffer; or a layer ends, and its
    own are copied into another, where the former is not yet let go of. Later layers have as much, and less is kept.
    A pathway that is not trained holds nothing of this.
    """
    if "pathway" not in load.stage.trains:
        return Moment()
    times = [(0, True), (1, True), (1, False), (2, False)]
    last = min(2, load.layers - 1)
    return fullest([_layer_backward(load, checkpointing, done, midway) for done, midway in times if done <= last])


def _layer_backward(load: Load, checkpointing: bool, done: int, midway: bool) -> Moment:
    """Where so many layers are gone through, and the next one is `midway`, else the last of them is being reduced.

    Gathered are what is in no layer, a buffer with the layer that comes next and, midway, a layer's own weights. Of
    gradients there are: a buffer in fp32, padded as the shards are, for each layer that is gone through, for two at
    most (FSDP2 of torch 2.12 fills the second before it lets go of the first, which a loop variable holds); in the
    working type, those of the layer that is being reduced, or midway of its MLP's last projection, and those of the
    position MLP, which wait for the rest of the bridge. Activations are those of layers that are left, with
    checkpointing a layer's that is computed again, and midway the gradients [tokens, hidden] of silu(gate), of up and
    of their product, which is no longer kept itself.
    """
    width, c, layer, more = load.width, load.sizes.language, load.layer, load.padding
    padded = layer + more["pathway"] / load.layers
    rest = load.bridge - layer * load.layers + more["position_mlp"]
    whole = c.intermediate_size * c.hidden_size if midway else layer
    waiting = load.parameters["position_mlp"] * ("position_mlp" in load.stage.trains)

    def kept(sample: Sample) -> float:
        left = pathway_kept(sample, c, width, checkpointing) * (load.layers - done)
        again = pathway_kept(sample, c, width, False) * checkpointing
        return left + (again + (3 - 1) * width * sample.pathway * c.intermediate_size) * midway

    return Moment(
        gathered=width * (rest + padded * (1 + midway)),
        gradients=FP32 * padded * done + width * (whole + waiting),
        activations=load.micro * max(map(kept, load.samples)),
    )
