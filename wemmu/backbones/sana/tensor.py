"""Tensor parallelism of diffusers' Sana: each rank of a group computes some heads and some feed-forward channels.

Only layers inside the blocks are replaced; diffusers' forward and its attention processors stay. Heads go to ranks in
order, the same number to each; if they do not divide, the last ranks get heads of zeros. Such a head stays zero: its
queries, keys and values are 0, so its output and the gradient of its columns of `to_out` are 0; those columns are 0, so
the gradient of its queries, keys and values is 0.

A block has 3 all-reduces forward (the outputs of the two attentions and of the feed-forward) and 4 backward (their
inputs, the condition among them); with qk_norm 3 more each way, of one number for a token.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models import SanaTransformer2DModel
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from wemmu.checkpoint.sharded_tensor import TensorRange, TensorSlice
from wemmu.parallel.tensor_layers import AcrossHeadsRMSNorm, Column, PointwiseColumn, PointwiseRow, Row, copied


def valid_degrees(config: Mapping[str, Any]) -> list[int]:
    """Return the numbers of ranks over which a Sana of this config (`dit.config`) can be split.

    They divide the channels of the feed-forward; with more ranks than heads some would have none.
    """
    hidden = int(config["mlp_ratio"] * config["num_attention_heads"] * config["attention_head_dim"])
    heads = min(config["num_attention_heads"], config["num_cross_attention_heads"])
    return [n for n in range(1, heads + 1) if hidden % n == 0]


def split(dit: SanaTransformer2DModel, group: ProcessGroup) -> dict[str, TensorSlice]:
    """Replace, in place, the layers of every block by this rank's parts of them, with the weights that `dit` holds now.

    All ranks of `group` give the same DiT; it may have lost some of its blocks, and its parameters may be on the meta
    device, where the parts are then, too. Names, types and `requires_grad` of parameters stay. The split DiT takes the
    same inputs on all ranks and returns the same output; gradients of inputs and of parameters that are not split are
    whole and equal on all ranks.

    Returns:
        For each parameter of the split DiT, by name, where it stands.

    Raises:
        ValueError: for a number of ranks or a kind of Sana that cannot be split, naming those that can.
    """
    _check(dit.config, group.size())
    splitter = _Splitter(group)
    block: Any
    for block in dit.transformer_blocks:
        for attention in (block.attn1, block.attn2):
            splitter.attention(attention)
        splitter.feed_forward(block.ff)
    return {name: splitter.place(name, parameter) for name, parameter in dit.named_parameters()}


def _check(config: Mapping[str, Any], ranks: int) -> None:
    if ranks not in (valid := valid_degrees(config)):
        raise ValueError(
            f"the DiT cannot be split over {ranks} tensor ranks, which must divide the channels of its feed-forward "
            f"and not outnumber its heads; valid: {', '.join(map(str, valid))}"
        )
    if config["qk_norm"] not in (None, "rms_norm_across_heads"):
        raise ValueError(
            f"a DiT with qk_norm {config['qk_norm']!r} cannot be split; valid: None, 'rms_norm_across_heads'"
        )
    if config["dropout"] != 0:
        raise ValueError(
            f"a DiT with dropout {config['dropout']} cannot be split: ranks would drop differently; valid: 0"
        )


def _enter(
    group: ProcessGroup, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Before a region that is split: the gradients of its inputs are summed, once for all layers that take them."""
    condition = kwargs.get("encoder_hidden_states")
    if condition is not None:
        kwargs = kwargs | {"encoder_hidden_states": copied(condition, group)}
    return tuple(copied(x, group) for x in args), kwargs


@dataclass(frozen=True)
class _Cut:
    """Elements of a dimension that one rank has: `size` in its local tensor, padding included."""

    size: int
    ranges: tuple[TensorRange, ...]


class _Splitter:
    """Replaces layers by this rank's parts, and records the place of each part."""

    def __init__(self, group: ProcessGroup):
        self._group = group
        self._places: dict[nn.Parameter, tuple[tuple[int, ...], int, _Cut]] = {}

    def place(self, name: str, parameter: nn.Parameter) -> TensorSlice:
        if parameter not in self._places:
            return TensorSlice(name, tuple(parameter.shape))
        shape, dim, cut = self._places[parameter]
        return TensorSlice(name, shape, dim, cut.ranges)

    def attention(self, attention: Any) -> None:
        """Replace the layers of a diffusers `Attention` by sharded ones."""
        width = attention.to_q.out_features
        cut = self._heads(width, attention.heads)
        for name in ("to_q", "to_k", "to_v"):
            setattr(attention, name, Column(*self._rows(getattr(attention, name), cut), self._group))
        if attention.norm_q is not None:
            self._norms(attention, width, cut)
        out = attention.to_out[0]
        attention.to_out[0] = Row(self._part(out.weight, 1, cut), out.bias, self._group)
        # Processors ask for the heads that they see.
        attention.heads = math.ceil(attention.heads / self._group.size())
        attention.register_forward_pre_hook(partial(_enter, self._group), with_kwargs=True)

    def _norms(self, attention: Any, width: int, cut: _Cut) -> None:
        q, k = (self._part(norm.weight, 0, cut) for norm in (attention.norm_q, attention.norm_k))
        attention.norm_k = AcrossHeadsRMSNorm(k, width, attention.norm_k.eps, self._group)
        if isinstance(attention.processor, SanaLinearAttnProcessor2_0):
            # Linear attention divides by the sum of a query's weights, so the query's length cancels: each rank may
            # take the root mean square over its own channels.
            attention.norm_q.weight = q
        else:
            attention.norm_q = AcrossHeadsRMSNorm(q, width, attention.norm_q.eps, self._group)

    def feed_forward(self, ff: Any) -> None:
        """Replace the layers of a diffusers `GLUMBConv` by sharded ones."""
        hidden = ff.conv_point.in_channels
        cut = self._halves(hidden)
        ff.conv_inverted = PointwiseColumn(*self._rows(ff.conv_inverted, cut), self._group)
        depth = ff.conv_depth
        depth.weight, depth.bias = self._rows(depth, cut)
        depth.in_channels = depth.out_channels = depth.groups = cut.size
        one = self._heads(hidden, hidden)
        ff.conv_point = PointwiseRow(self._part(ff.conv_point.weight, 1, one), None, self._group)
        ff.register_forward_pre_hook(partial(_enter, self._group), with_kwargs=True)

    def _heads(self, width: int, heads: int) -> _Cut:
        """Put equally many heads on every rank; the last heads may be padding."""
        size = math.ceil(heads / self._group.size()) * (width // heads)
        begin = self._group.rank() * size
        end = min(begin + size, width)
        return _Cut(size, ((begin, end, 0),) if begin < end else ())

    def _halves(self, hidden: int) -> _Cut:
        """Channels [values, gates] of a gated feed-forward: a value and its gate are on one rank."""
        size = hidden // self._group.size()
        begin = self._group.rank() * size
        return _Cut(2 * size, ((begin, begin + size, 0), (hidden + begin, hidden + begin + size, size)))

    def _rows(self, layer: nn.Linear | nn.Conv2d, cut: _Cut) -> tuple[nn.Parameter, nn.Parameter | None]:
        return self._part(layer.weight, 0, cut), None if layer.bias is None else self._part(layer.bias, 0, cut)

    @torch.no_grad()
    def _part(self, whole: Tensor, dim: int, cut: _Cut) -> nn.Parameter:
        shape = [*whole.shape]
        shape[dim] = cut.size
        local = whole.new_zeros(shape)
        for begin, end, at in cut.ranges:
            local.narrow(dim, at, end - begin).copy_(whole.narrow(dim, begin, end - begin))
        part = nn.Parameter(local, requires_grad=whole.requires_grad)
        self._places[part] = tuple(whole.shape), dim, cut
        return part
