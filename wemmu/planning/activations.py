"""Bytes that a step keeps for its backward pass, as autograd counts them for the code as it runs here.

Tensor by tensor: tests/planning measures it. Kernels that fuse need less.
"""

from wemmu.planning.backbones import DCAE, Language, Sana
from wemmu.planning.flops import Sample
from wemmu.planning.load import FP32, Load
from wemmu.planning.parameters import tensor_widths

# Feature maps of the VAE's largest block that exist at one time: its input, the second convolution's and the norm's in
# the type of the backbones, and two more in fp32 inside the norm.
ENCODER_MAPS, ENCODER_MAPS_FP32 = 3, 2


def activations(sample: Sample, load: Load, checkpointing: bool) -> float:
    """Bytes kept for the backward pass on the first pipeline stage.

    The bridge has one micro-batch under way, the DiT as many as there are stages.
    """
    dit, language, width, pp = load.sizes.dit, load.sizes.language, load.width, load.degrees.pp
    bridge = bool(set(load.stage.trains) - {"dit"})
    layers = pathway_kept(sample, language, width, checkpointing) * load.layers * bridge
    block = dit_block_kept(sample, dit, width, "dit" in load.stage.trains, load.degrees.tp)
    mlp = width * sample.queries * (language.hidden_size + 4 * dit.caption_channels) * bridge
    ends = width * dit.width * (7 * sample.queries + 4 * sample.latents)
    if checkpointing:
        # The input of every block, and one layer or block as it is computed again.
        again = max(pathway_kept(sample, language, width, False) * bridge, block)
        return load.micro * (layers + mlp + pp * (width * sample.latents * dit.width * load.blocks + ends) + again)
    return load.micro * (layers + mlp + pp * (block * load.blocks + ends))


def pathway_kept(sample: Sample, c: Language, number: int, checkpointing: bool) -> float:
    """Bytes that a layer of the pathway keeps until it is gone back through; `number` bytes a number.

    With checkpointing its input, and the prefix's keys and values.
    """
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


def encoding(sample: Sample, vae: DCAE, number: int) -> float:
    """Bytes of the VAE's feature maps where they are largest, for one image of each kind."""
    widths, depths = vae.encoder_block_out_channels, vae.encoder_layers_per_block
    numbers_per_pixel = max(width / 4.0**i for i, width in enumerate(widths) if depths[i])
    bytes_per_number = ENCODER_MAPS * number + ENCODER_MAPS_FP32 * FP32
    return bytes_per_number * numbers_per_pixel * max((side**2 for side in sample.encoded), default=0)
