"""The engine for a DiT that is too large for one rank: tensor and pipeline parallel; the bridge is neither.

Every rank runs the bridge on its own samples. The ranks of a model group then hand their conditions to each other
(`boundary`) and run their DiT, cut into stages (`pipeline`) and slices (`tensor`), on all of them; the gradients of the
conditions go back to their owners, whose bridges go on with the backward pass. Bridges are sharded over all ranks, each
part of the DiT over the ranks that hold the same part (`shards`).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from wemmu.checkpoint.sharded_tensor import ShardedTensor, TensorSlice
from wemmu.checkpoint.state import TrainState
from wemmu.config.schema import StageRun
from wemmu.parallel import shards
from wemmu.parallel.adamw import AdamW
from wemmu.parallel.boundary import Boundary
from wemmu.parallel.pipeline import Pipeline, StageRunner
from wemmu.parallel.topology import Topology
from wemmu.types import Batch, Begun, Flow, Losses


@runtime_checkable
class LossInParts(Protocol):
    """An objective in two parts: `begin` runs the bridge; `values` computes one loss per sample from velocities."""

    def begin(self, batch: Batch, step: int) -> Begun: ...
    def values(self, predicted: Tensor, flow: Flow) -> Tensor: ...


class HybridEngine:
    """See `wemmu.parallel.engine.Engine`. Takes the model apart: its DiT is split, its parameters are sharded."""

    def __init__(
        self,
        model: Any,
        loss: LossInParts,
        run: StageRun,
        topology: Topology,
        device: torch.device,
        apex: bool = False,
    ):
        """Cut the model, of whose two `sharded` parts the last is the DiT: see `wemmu.recipes.wemmu.model.WeMMU`.

        apex: see `wemmu.parallel.adamw.AdamW`.
        """
        self.config, self._loss, self._topology = run.stage.optimizer, loss, topology
        # The ranks of a model group share a DiT.
        self._boundary = Boundary(topology.group("stage", "tensor"))
        stage_group, data_group = topology.group("stage"), topology.group("data")

        part = model.cut_dit(topology.stage, topology.pp)
        places = part.split(topology.group("tensor"))
        runner = StageRunner(part)
        for name, child in model.named_children():
            if name not in model.sharded:
                child.to(device)
        shards.shard(runner, part.blocks, data_group, device)
        everyone = dist.group.WORLD
        assert everyone is not None
        (bridge, layers), (prefix, dit) = model.beside_dit(), model.sharded
        shards.shard(bridge, layers, everyone, device)
        self._pipeline = Pipeline(
            runner, topology.stage, topology.pp, stage_group, device,
            loss=lambda flow, predicted: loss.values(predicted, flow), scale=1 / run.stage.global_batch,
        )  # fmt: skip
        model.run_dit_by(self._pipeline.velocity)

        # Canonical name -> sharded parameter, and where that stands in the whole one; what tensor ranks have alike.
        self._sharded: dict[str, Any] = {}
        self._places: dict[str, TensorSlice] = {}
        self._alike: set[str] = set()
        for name, parameter in bridge.named_parameters(prefix=prefix):
            self._sharded[name], self._places[name] = parameter, TensorSlice(name, tuple(parameter.shape))
        for name, parameter in part.named_parameters():
            whole = f"{dit}.{part.canonical(name)}"
            self._sharded[whole], self._places[whole] = parameter, places[name]
            if places[name].dim is None:
                self._alike.add(whole)
        self._trained = {name: p for name, p in self._sharded.items() if p.requires_grad}
        self._adamw = AdamW({name: shards.local(p) for name, p in self._trained.items()}, run, apex)

    def accumulate(self, micro_batches: Sequence[Batch], step: int) -> list[Losses]:
        return [self._round(batch, step) for batch in micro_batches]

    def _round(self, batch: Batch, step: int) -> Losses:
        """A micro-batch of this rank's bridge, which is one of as many as the group has ranks to its DiT."""
        flow, condition, tags = self._loss.begin(batch, step)
        together = self._boundary.gather(flow, condition.states)
        values = self._pipeline.run(together)
        # The first rank of a group has the first stage, the first of its last stage the losses; tensor ranks agree.
        first, last = 0, self._topology.tp * (self._topology.pp - 1)
        here = self._topology.rank % self._boundary.size
        gradients: list[Any] | None = [states.grad for _, states in together] if here == first else None
        gradient = self._boundary.give_back(gradients, condition.states, first)
        mine = self._boundary.give_back(values if here == last else None, flow.t, last)
        condition.states.backward(gradient)
        return Losses(mine, tags)

    def step(self, lr_share: float) -> float:
        masters, gradients = self._adamw.weights, {}
        for name, parameter in self._trained.items():
            none = parameter.grad is None
            gradients[name] = torch.zeros_like(masters[name]) if none else shards.local(parameter.grad)
            masters[name].grad = gradients[name]
        norm = self._norm(gradients)
        factor = self.config.clip / (norm + 1e-6)
        if factor < 1:
            for gradient in gradients.values():
                gradient.mul_(factor)
        self._adamw.step(lr_share, torch.tensor(norm))
        self._adamw.zero_grad()
        for parameter in self._trained.values():
            parameter.grad = None
        return norm

    def _norm(self, gradients: dict[str, Tensor]) -> float:
        """The norm of the whole gradient: every shard once, and what tensor ranks have alike on one of them."""
        counted = [g for name, g in gradients.items() if self._topology.tensor == 0 or name not in self._alike]
        square = torch.stack([g.square().sum() for g in counted]).sum()
        dist.all_reduce(square)
        return math.sqrt(float(square)) if float(square) >= 0 else math.nan

    def state(self) -> TrainState:
        state = self._adamw.state()
        parts = (state.weights, state.exp_avg, state.exp_avg_sq, state.ema)
        weights, exp_avg, exp_avg_sq, ema = map(self._placed, parts)
        return TrainState(weights, exp_avg, exp_avg_sq, state.steps, ema)

    def local_parameters(self, names: Iterable[str]) -> dict[str, Tensor]:
        return self._placed({name: shards.local(self._sharded[name]) for name in names if name in self._sharded})

    def on_restore(self, steps: int) -> None:
        self._adamw.on_restore(steps)

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients accumulated so far, for comparison with other engines."""
        return self._placed({n: shards.local(p.grad) for n, p in self._trained.items() if p.grad is not None})

    def _placed(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """By name this rank's rows of a parameter, or of what goes with it, as parts of the whole."""
        return {
            name: ShardedTensor(self._places[name].shape, shards.parts(self._sharded[name], tensor, self._places[name]))
            for name, tensor in rows.items()
        }
