"""The training loop of every recipe here: seeded, resumable, with readable progress."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from wemmu.config.files import replacing
from wemmu.shapes.backbones import HIGH_PX, LOW_PX
from wemmu.shapes.scene import Split

SAVE_EVERY = 500
HELD_OUT: tuple[Split, ...] = ("test", "composition")


def held_out(measure: Callable[[Split, int], float]) -> dict[str, float]:
    """Return the values of `measure` for each held-out split at both resolutions."""
    return {f"{split} {px}": measure(split, px) for split in HELD_OUT for px in (LOW_PX, HIGH_PX)}


def fit(
    name: str,
    modules: dict[str, nn.Module],
    loss_fn: Callable[[int], tuple[Tensor, dict[str, float]]],
    *,
    steps: int,
    lr: float,
    work: Path,
    warmup: int = 100,
    evaluate: Callable[[], dict[str, float]] | None = None,
    evaluate_every: int = 1000,
) -> None:
    """Minimise `loss_fn(step)` over the parameters of `modules` with AdamW, warm-up and a cosine to zero.

    `loss_fn` draws its own batch from the step's number, so that a resumed run sees what an undisturbed one sees.
    State goes to `work/<name>.pt` every `SAVE_EVERY` steps, by rename; a later call goes on from there.
    """
    params = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    state_file = work / f"{name}.pt"
    start = _load(state_file, modules, optimizer) if state_file.exists() else 0
    begun = time.monotonic()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss, parts = loss_fn(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            rate = (step + 1 - start) / (time.monotonic() - begun)
            shown = "  ".join(f"{k} {v:.4f}" for k, v in parts.items())
            print(
                f"{name} {step + 1}/{steps}  {shown}  {rate:.2f} it/s  {(steps - step - 1) / rate / 60:.1f} min left",
                flush=True,
            )
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            _save(state_file, modules, optimizer, step + 1)
        if evaluate is not None and ((step + 1) % evaluate_every == 0 or step + 1 == steps):
            print(f"{name} {step + 1}  " + json.dumps({k: round(v, 4) for k, v in evaluate().items()}), flush=True)


def _save(file: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, step: int) -> None:
    states = {k: m.state_dict() for k, m in modules.items()}
    with replacing(file) as aside:
        torch.save({"modules": states, "optimizer": optimizer.state_dict(), "step": step}, aside)


def _load(file: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> int:
    state = torch.load(file, weights_only=True)
    for key, module in modules.items():
        module.load_state_dict(state["modules"][key])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
