"""The single-device engine: the reference that every other engine must equal."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wemmu.config.schema import Optimizer as OptimizerConfig


@dataclass(frozen=True)
class TrainState:
    """Everything an optimizer step changes, under canonical names and full shapes.

    weights, exp_avg, exp_avg_sq: one tensor for each trained parameter. steps: optimizer steps taken.
    """

    weights: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    steps: int


class SingleEngine:
    """AdamW over the trained parameters of one module tree.

    Groups: the DiT (canonical names `dit.*`) has its own learning rate; vectors (norms, biases) are never decayed.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig):
        self.config = config
        self.trained: dict[str, nn.Parameter] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ValueError("nothing to train: every parameter is frozen")
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.trained.items():
            vector = parameter.ndim < 2
            bridge_lr = config.lr * config.vector_scale if vector else config.lr
            lr = config.dit_lr if name.startswith("dit.") else bridge_lr
            decay = 0.0 if vector else config.weight_decay
            groups.setdefault((lr, decay), []).append(parameter)
        self._optimizer = torch.optim.AdamW(
            [{"params": ps, "lr": lr, "peak_lr": lr, "weight_decay": wd} for (lr, wd), ps in groups.items()],
            betas=config.betas,
            fused=True,
        )

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's share of the global mean loss."""
        loss.backward()

    def step(self, lr_share: float) -> float:
        """Clip by the global norm, step with `lr_share` of the peak rates, and clear the gradients.

        Returns the gradient norm before clipping. A norm that is not finite leaves the weights untouched; the caller
        decides what that means.
        """
        for parameter in self.trained.values():
            if parameter.grad is None:
                # A batch may not use a module (no picture, no VAE branch). Its gradient is zero, as it is in sharded
                # engines, and not absent: all moments decay at every step.
                parameter.grad = torch.zeros_like(parameter)
        norm = float(nn.utils.clip_grad_norm_(self.trained.values(), self.config.clip))
        if norm == norm and norm != float("inf"):
            for group in self._optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_share
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self) -> TrainState:
        """A view of the live tensors; copy before the next step if it must last."""
        self._create_moments()
        states = {name: self._optimizer.state[p] for name, p in self.trained.items()}
        steps = {int(s["step"]) for s in states.values()}
        assert len(steps) == 1, "all parameters take every step"
        return TrainState(
            weights={name: p.detach() for name, p in self.trained.items()},
            exp_avg={name: s["exp_avg"] for name, s in states.items()},
            exp_avg_sq={name: s["exp_avg_sq"] for name, s in states.items()},
            steps=steps.pop(),
        )

    @torch.no_grad()
    def load(self, state: TrainState) -> None:
        """Take over weights, moments and step count."""
        self._create_moments()
        self.load_weights(state.weights)
        for name, parameter in self.trained.items():
            mine = self._optimizer.state[parameter]
            mine["exp_avg"].copy_(state.exp_avg[name])
            mine["exp_avg_sq"].copy_(state.exp_avg_sq[name])
            mine["step"].fill_(state.steps)

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(weights[name])

    def _create_moments(self) -> None:
        """Make the state AdamW would make at its first step, so that it can be saved and loaded before one."""
        for parameter in self.trained.values():
            if not self._optimizer.state[parameter]:
                self._optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
