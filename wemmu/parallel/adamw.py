"""AdamW over float32 tensors by name, whole or sharded: each element is updated alone."""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from wemmu.checkpoint.state import TrainState
from wemmu.config.schema import StageRun
from wemmu.kernels import fused_adam


@torch.no_grad()
def average(averages: Sequence[Tensor], weights: Sequence[Tensor], decay: float, steps: int) -> None:
    """Move the averages of weights, in place, after optimizer step number `steps`: ema = d ema + (1 - d) w.

    d = min(decay, (1 + steps) / (10 + steps)): a young average does not hold on to where the stage began.
    """
    d = min(decay, (1 + steps) / (10 + steps))
    torch._foreach_lerp_(list(averages), list(weights), 1 - d)


class AdamW:
    """Steps on `weights`, name -> float32 tensor, in place. The gradients are put into `weights[name].grad`."""

    def __init__(self, weights: Mapping[str, Tensor], run: StageRun, apex: bool = False):
        """With `apex` NVIDIA Apex's FusedAdam takes the steps, else torch's fused AdamW; their states are alike.

        Raises:
            ValueError: if there is nothing to train.
        """
        if not weights:
            raise ValueError("nothing to train: every parameter is frozen")
        # A parameter of its own on the same memory: torch's optimizer takes leaves only.
        self.weights = {name: nn.Parameter(weight.detach()) for name, weight in weights.items()}
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, weight in self.weights.items():
            groups.setdefault(run.rates(name, weight.ndim), []).append(weight)
        config = run.stage.optimizer
        made = [{"params": ps, "lr": lr, "peak_lr": lr, "weight_decay": wd} for (lr, wd), ps in groups.items()]
        self._apex, self._decay, self._taken = apex, config.ema_decay, 0
        self._optimizer = (
            fused_adam()(made, betas=config.betas, eps=1e-8)
            if apex
            else torch.optim.AdamW(made, betas=config.betas, eps=1e-8, fused=True)
        )
        if self._decay is not None:
            # An average begins before the first step.
            self._fill_state()

    def step(self, lr_share: float, norm: Tensor) -> None:
        """Take a step, unless the gradient's `norm`, a scalar, is not finite.

        Of a norm on a GPU torch's optimizer decides there, so the host does not wait. (The average then still moves
        towards the weights, but the trainer ends the run before it saves.)
        """
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_share
        if norm.device.type != "cpu" and not self._apex:
            # As torch's gradient scaler tells it.
            setattr(self._optimizer, "found_inf", (~torch.isfinite(norm)).float())  # noqa: B010
        elif not math.isfinite(norm):
            return
        self._optimizer.step()
        self._taken += 1
        if self._decay is not None:
            states = self._optimizer.state
            averages = [states[weight]["ema"] for weight in self.weights.values()]
            average(averages, list(self.weights.values()), self._decay, self._taken)

    def zero_grad(self) -> None:
        for weight in self.weights.values():
            weight.grad = None

    def state(self) -> TrainState:
        """Return the live weights, moments and averages; moments that do not exist yet are created as zeros."""
        self._fill_state()
        states = {name: self._optimizer.state[weight] for name, weight in self.weights.items()}
        steps = set(self._steps())
        assert len(steps) == 1, "all parameters take every step"
        return TrainState(
            weights={name: weight.detach() for name, weight in self.weights.items()},
            exp_avg={name: state["exp_avg"] for name, state in states.items()},
            exp_avg_sq={name: state["exp_avg_sq"] for name, state in states.items()},
            steps=steps.pop(),
            ema={} if self._decay is None else {name: state["ema"] for name, state in states.items()},
        )

    def _fill_state(self) -> None:
        """Make what the optimizer keeps of a weight, where it has not yet, beside the weight."""
        for weight in self.weights.values():
            if not self._optimizer.state[weight]:
                state = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
                if not self._apex:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
                if self._decay is not None:
                    state["ema"] = weight.detach().clone()
                self._optimizer.state[weight] = state

    def _steps(self) -> Iterator[int]:
        """The number of steps taken, once for each of its counters; Apex counts in each group, from its first step."""
        counters = self._optimizer.param_groups if self._apex else self._optimizer.state.values()
        return (int(each.get("step", 0)) for each in counters)

    def on_restore(self, steps: int) -> None:
        """Go on from `steps` steps, with the weights and moments that were written into the tensors of `state`."""
        self.state()
        self._taken = steps
        if self._apex:
            for group in self._optimizer.param_groups:
                group["step"] = steps
            return
        for weight in self.weights.values():
            self._optimizer.state[weight]["step"].fill_(steps)
