"""The single-device engine: the reference that every other engine must equal."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import SupportsFloat

import torch
from torch import Tensor, nn

from wemmu.checkpoint.state import TrainState
from wemmu.config.schema import StageRun
from wemmu.parallel.adamw import AdamW
from wemmu.parallel.reading import on_its_way
from wemmu.types import Batch, Losses, LossFn


class SingleEngine:
    """All of the trained parameters, their float32 masters and their moments on one device.

    Where the model computes in another type (bfloat16), each weight has a float32 master that the optimizer moves, and
    gradients are summed over micro-batches in float32, as sharded engines do it.
    """

    def __init__(self, model: nn.Module, loss: LossFn, run: StageRun, apex: bool = False):
        """apex: see `wemmu.parallel.adamw.AdamW`."""
        self.config, self._global_batch = run.stage.optimizer, run.stage.global_batch
        self._model, self._loss = model, loss
        self._working: dict[str, nn.Parameter] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._adamw = AdamW({name: p.detach().float() for name, p in self._working.items()}, run, apex)

    def accumulate(self, micro_batches: Sequence[Batch], step: int) -> list[Losses]:
        found = []
        # Only now: other engines of the same model must find their gradients.
        hooks = [
            working.register_post_accumulate_grad_hook(partial(_collect, self._adamw.weights[name]))
            for name, working in self._working.items()
        ]
        try:
            for batch in micro_batches:
                losses = self._loss(batch, step)
                (losses.values.sum() / self._global_batch).backward()
                found.append(losses.detached())
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def step(self, lr_share: float) -> SupportsFloat:
        masters = self._adamw.weights
        for master in masters.values():
            if master.grad is None:
                # A parameter that no micro-batch uses has a gradient of zero, as in sharded engines, and not none: all
                # moments decay at every step.
                master.grad = torch.zeros_like(master)
        norm = nn.utils.clip_grad_norm_(masters.values(), self.config.clip)
        self._adamw.step(lr_share, norm)
        self._to_working()
        self._adamw.zero_grad()
        return on_its_way(norm)

    def state(self) -> TrainState:
        return self._adamw.state()

    def local_parameters(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._model.get_parameter(name).detach() for name in names}

    def on_restore(self, steps: int) -> None:
        self._adamw.on_restore(steps)
        self._to_working()

    @torch.no_grad()
    def _to_working(self) -> None:
        for name, master in self._adamw.weights.items():
            if master.data_ptr() != self._working[name].data_ptr():
                self._working[name].copy_(master)

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients accumulated so far, by name, for comparison with other engines."""
        return {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in self._adamw.weights.items()}


def _collect(master: nn.Parameter, working: Tensor) -> None:
    """Add the gradient of a weight to its master's, in float32, as soon as the backward pass has it."""
    gradient, working.grad = working.grad, None
    assert gradient is not None, "called when there is one"
    if master.grad is None:
        master.grad = gradient.float()
    else:
        master.grad.add_(gradient)
