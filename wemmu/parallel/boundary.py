"""The boundary between the bridge, which every rank runs for its samples, and a DiT that a group of ranks shares.

Each rank sends its conditions and points, which become a micro-batch of the DiT. It receives the losses and the
gradients of its conditions.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from wemmu.types import Flow


class Boundary:
    """group: the ranks that share a DiT (a model group)."""

    def __init__(self, group: dist.ProcessGroup):
        self._group = group
        self._ranks = dist.get_process_group_ranks(group)
        self.size = len(self._ranks)

    def gather(self, flow: Flow, states: Tensor) -> list[tuple[Flow, Tensor]]:
        """Gather every rank's points and the condition's states [B, Q, C] on every rank, in rank order.

        All have one shape. The states are leaves, so that their gradients can be collected and given back.
        """
        parts: dict[str, Sequence[Any]] = {}
        for field in fields(flow):
            value = getattr(flow, field.name)
            parts[field.name] = [None] * self.size if value is None else self._gather(value)
        flows = [Flow(**{name: values[i] for name, values in parts.items()}) for i in range(self.size)]
        return list(zip(flows, (s.requires_grad_() for s in self._gather(states.detach())), strict=True))

    def give_back(self, values: Sequence[Tensor] | None, like: Tensor, source: int) -> Tensor:
        """Scatter `values` from the rank `source` of the group; shape and dtype are those of `like`."""
        mine = torch.empty_like(like, memory_format=torch.contiguous_format)
        is_source = self._group.rank() == source
        assert (values is not None) == is_source
        dist.scatter(mine, [v.contiguous() for v in values] if values else None, self._ranks[source], self._group)
        return mine

    def _gather(self, value: Tensor) -> list[Tensor]:
        # Not every back end takes booleans.
        sent = (value.byte() if value.dtype == torch.bool else value).contiguous()
        found = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(found, sent, self._group)
        return [one.bool() for one in found] if value.dtype == torch.bool else found
