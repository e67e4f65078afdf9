"""The layers of DC-AE (diffusers' AutoencoderDC), each with the resolution that it works at."""

from collections.abc import Iterator, Sequence

from wemmu.planning.backbones import DCAE
from wemmu.planning.layers import Layer, conv, linear, total, vector


def encoder(vae: DCAE) -> Iterator[tuple[Layer, int]]:
    """(layer, s): its outputs stand on a grid of (height / s) x (width / s) px."""
    widths, depths = vae.encoder_block_out_channels, vae.encoder_layers_per_block
    unshuffle = vae.downsample_block_type == "pixel_unshuffle"
    if depths[0] > 0:
        yield conv(vae.in_channels, widths[0], 3), 1
    else:
        yield _down(vae.in_channels, widths[1], 1, unshuffle)
    blocks = _by_block(vae.encoder_block_types, vae.encoder_qkv_multiscales, widths, depths)
    for i, (kind, scales, width, depth) in enumerate(blocks):
        yield block(kind, width, vae.attention_head_dim, scales) * depth, 2**i
        if i < len(widths) - 1 and depth > 0:
            yield _down(width, widths[i + 1], 2**i, unshuffle)
    yield conv(widths[-1], vae.latent_channels, 3), vae.latent_px


def decoder_parameters(vae: DCAE) -> int:
    widths, depths = vae.decoder_block_out_channels, vae.decoder_layers_per_block
    # Without interpolation a convolution makes all four pixels of an upsampled one.
    pixels = 1 if vae.upsample_block_type == "interpolate" else 4
    layers = [conv(vae.latent_channels, widths[-1], 3)]
    blocks = _by_block(vae.decoder_block_types, vae.decoder_qkv_multiscales, widths, depths)
    for i, (kind, scales, width, depth) in enumerate(blocks):
        layers.append(block(kind, width, vae.attention_head_dim, scales) * depth)
        if i < len(widths) - 1 and depth > 0:
            layers.append(conv(widths[i + 1], pixels * width, 3))
    if depths[0] > 0:
        layers += [vector(2 * widths[0]), conv(widths[0], vae.in_channels, 3)]
    else:
        layers += [vector(2 * widths[1]), conv(widths[1], pixels * vae.in_channels, 3)]
    return total(layers).parameters


def encoder_parameters(vae: DCAE) -> int:
    return sum(layer.parameters for layer, _ in encoder(vae))


def encoder_products(vae: DCAE, side: int) -> float:
    """Multiply-adds to encode one image of `side` x `side` px."""
    return sum(layer.products * (side / scale) ** 2 for layer, scale in encoder(vae))


def block(kind: str, width: int, head: int, scales: Sequence[int]) -> Layer:
    """A ResBlock, or an EfficientViTBlock with linear attention over `scales`, kernel sizes of its projections."""
    if kind == "ResBlock":
        return total([conv(width, width, 3), conv(width, width, 3, bias=False), vector(2 * width)])
    inner = width // head * head
    groups = 3 * inner // head
    attention = [linear(width, inner, bias=False) * 3]
    for kernel in scales:
        attention.append(conv(3 * inner, 3 * inner, kernel, groups=3 * inner, bias=False))
        attention.append(conv(3 * inner, 3 * inner, 1, groups=groups, bias=False))
    # Two products of [head + 1, N] and [N, head] for each head of each scale; the extra row is the normaliser.
    products = Layer(0, 2 * (1 + len(scales)) * inner * (head + 1))
    out = linear(inner * (1 + len(scales)), width, bias=False)
    return total([*attention, products, out, vector(2 * width), *gated(width, 4 * width), vector(2 * width)])


def gated(width: int, hidden: int) -> list[Layer]:
    """GLUMBConv: 1x1 to two halves of `hidden` channels, 3x3 in each channel, the gate, 1x1 back."""
    return [
        conv(width, 2 * hidden, 1),
        conv(2 * hidden, 2 * hidden, 3, groups=2 * hidden),
        conv(hidden, width, 1, bias=False),
    ]


def _down(inputs: int, outputs: int, scale: int, unshuffle: bool) -> tuple[Layer, int]:
    """Halve the grid: a convolution with stride 2, or one that makes a quarter of the channels before it folds."""
    return (conv(inputs, outputs // 4, 3), scale) if unshuffle else (conv(inputs, outputs, 3), 2 * scale)


def _by_block(
    kinds: str | tuple[str, ...], scales: Sequence[Sequence[int]], widths: Sequence[int], depths: Sequence[int]
) -> Iterator[tuple[str, Sequence[int], int, int]]:
    kinds = (kinds,) * len(widths) if isinstance(kinds, str) else kinds
    return zip(kinds, scales, widths, depths, strict=True)
