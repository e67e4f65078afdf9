"""A small model and its stage, for what an engine does that has nothing to do with layers; imports little."""

import torch
from torch import Tensor, nn

from tests.training.runs import STAGE_RUN
from wemmu.config import StageRun
from wemmu.parallel import zero3
from wemmu.parallel.zero3 import Zero3Engine
from wemmu.types import Losses

# Of the samples, one for each of three ranks: what their losses are multiplied by.
FACTORS = [0.5, 1.0, 2.0]


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Toy(nn.Module):
    """Parameters that three ranks cannot share evenly, one of a single element, and one that step 1 does not use."""

    sharded = ("bridge", "dit")

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.vlm, self.vae = nn.Linear(2, 2), nn.Linear(3, 2)
        self.bridge = nn.ModuleDict({"linear": nn.Linear(4, 5), "sometimes": nn.Linear(4, 5), "norm": nn.LayerNorm(5)})
        self.dit = nn.ModuleDict({"linear": nn.Linear(5, 3), "frozen": nn.Linear(3, 3), "scale": Scale()})
        for frozen in (self.vlm, self.vae, self.dit["frozen"]):
            frozen.requires_grad_(False)
        self.to(dtype)

    def loss(self, factor: float, step: int) -> Losses:
        """A batch is one sample, which is the factor of its loss."""
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step)).to(self.vlm.weight.dtype)
        h = self.bridge["linear"](x)
        if step != 1:
            h = h + self.bridge["sometimes"](x)
        y = self.dit["scale"](self.dit["frozen"](self.dit["linear"](self.bridge["norm"](h))))
        return Losses(factor * y.float().square().mean()[None], {})


def toy_run(**optimizer: object) -> StageRun:
    changed = {
        "lr": 1e-3,
        "module_lr": {"dit": 4e-4},
        "vector_scale": 3.0,
        "weight_decay": 0.1,
        "clip": 0.1,
        "ema_decay": 0.9,
    }
    fields = {f"stage.optimizer.{name}": value for name, value in (changed | optimizer).items()}
    return STAGE_RUN.changed(fields | {"stage.global_batch": len(FACTORS)})


class Watched(Zero3Engine):
    """Makes sure that between forward and step the weights are in shards, but for the small ones that stay."""

    def step(self, lr_share: float) -> float:
        sharded = {n: p for n, p in self._engine.module.named_parameters() if p.ds_numel > zero3.PERSISTENT}
        assert sharded, "nothing is in shards, so this proves less"
        whole = {name: p.ds_status.name for name, p in sharded.items() if p.numel()}
        assert not whole, f"still gathered: {whole}"
        return super().step(lr_share)
