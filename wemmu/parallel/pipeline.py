"""Runs one model group's DiT: forward and backward of many micro-batches through its stages, or a velocity."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from wemmu.types import Flow

MicroBatch = tuple[Flow, Tensor]  # points, and states of the condition [B, Q, caption channels]


class StageRunner(nn.Module):
    """A stage as the schedule calls it: the first with the index of a micro-batch, others with the previous output.

    The stage looks up the micro-batch, so its condition is a leaf of the stage's graph: torch's pipeline cannot take
    tensors that need a gradient outside.
    """

    def __init__(self, part: Any):
        super().__init__()
        self.part = part
        self.micro_batches: Sequence[MicroBatch] = ()

    def forward(self, *inputs: Tensor) -> Any:
        if self.part.is_first:
            flow, states = self.micro_batches[int(inputs[0])]
            inputs = (flow.x_t, flow.t, states)
        out = self.part(inputs, self.micro_batches[0][0].x_t.shape)
        if self.part.is_last:
            return out
        # The pipeline wants a gradient of all that it sends, also of the time that a frozen DiT embeds.
        return tuple(x if x.requires_grad or not torch.is_grad_enabled() else x.detach().requires_grad_() for x in out)


class Pipeline:
    """The stages of one DiT; this rank runs `runner`, stage `stage` of `stages` in `group`.

    loss: (micro-batch's points, predicted velocity) -> one loss per sample [B]; scale: what they are multiplied with
    before the backward pass.
    """

    def __init__(
        self,
        runner: StageRunner,
        stage: int,
        stages: int,
        group: dist.ProcessGroup,
        device: torch.device,
        loss: Callable[[Flow, Tensor], Tensor],
        scale: float,
    ):
        self.runner, self.stage, self.stages = runner, stage, stages
        self._group, self._device, self._loss, self._scale = group, device, loss, scale
        self._schedules: dict[tuple[int, torch.Size, torch.Size], Schedule1F1B] = {}
        self._values: dict[int, Tensor] = {}

    def run(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Forward and backward of all micro-batches, of one shape; leaves the states' `grad` on the first stage.

        Returns the losses of each, [B], on the last stage; elsewhere nothing.
        """
        self.runner.micro_batches = micro_batches
        self._values = {}
        numbers = torch.arange(len(micro_batches))
        arguments = (numbers,) if self.runner.part.is_first else ()
        targets: dict[str, Any] = {"target": numbers, "return_outputs": False} if self.runner.part.is_last else {}
        self._schedule(micro_batches).step(*arguments, **targets)
        self.runner.micro_batches = ()
        return [self._values[i] for i in range(len(micro_batches))] if self.runner.part.is_last else []

    def _total(self, predicted: Tensor, number: Tensor) -> Tensor:
        flow, _ = self.runner.micro_batches[int(number)]
        values = self._loss(flow, predicted)
        self._values[int(number)] = values.detach()
        return values.sum() * self._scale

    def _schedule(self, micro_batches: Sequence[MicroBatch]) -> Schedule1F1B:
        """The schedule for micro-batches of this shape and number; torch fixes shapes with the first that it sees."""
        flow, states = micro_batches[0]
        key = (len(micro_batches), flow.x_t.shape, states.shape)
        if key not in self._schedules:
            passed = self.runner.part.activations(flow.x_t, states)
            first, last = self.runner.part.is_first, self.runner.part.is_last
            stage = PipelineStage(
                self.runner,
                self.stage,
                self.stages,
                self._device,
                input_args=(torch.empty(1, dtype=torch.int64, device="meta"),) if first else passed,
                output_args=(torch.empty(flow.x_t.shape, device="meta", requires_grad=True),) if last else passed,
                group=self._group,
            )
            self._schedules[key] = Schedule1F1B(stage, len(micro_batches), loss_fn=self._total, scale_grads=False)
        return self._schedules[key]

    @torch.no_grad()
    def velocity(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """Compute v_theta, float32 [B, C, h, w], on every rank of the group; all pass the same inputs."""
        flow = Flow(x_t, t, x_t)
        self.runner.micro_batches = [(flow, states)]
        ranks = dist.get_process_group_ranks(self._group)
        passed = tuple(torch.empty_like(x, device=self._device) for x in self.runner.part.activations(flow.x_t, states))
        inputs: tuple[Tensor, ...] = (torch.zeros(1, dtype=torch.int64),)
        if self.stage > 0:
            for x in passed:
                dist.recv(x, ranks[self.stage - 1], self._group)
            inputs = passed
        out = self.runner(*inputs)
        v = out if self.stage == self.stages - 1 else torch.empty_like(x_t, dtype=torch.float32)
        if self.stage < self.stages - 1:
            for x in out:
                dist.send(x.contiguous(), ranks[self.stage + 1], self._group)
        v = v.contiguous()
        if self.stages > 1:
            dist.broadcast(v, ranks[-1], self._group)
        self.runner.micro_batches = ()
        return v
