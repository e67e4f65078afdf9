"""Folders that DeepSpeed itself writes, of the tiny bridge model inside somebody's own module, with what is in them."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from tests.models.world import micro_batches
from tests.parallel.cases import EDIT, GLOBAL_BATCH, Case
from wemmu.config.schema import Backbones
from wemmu.parallel.zero3 import load_deepspeed
from wemmu.prompts import PromptEncoder
from wemmu.recipes.wemmu.loss import FlowMatchingLoss
from wemmu.types import Batch, Losses

TAG, STEPS = "global_step2", 2
TABLE = {"wemmu.": "", "extra.": "-"}
BRIDGE_ONLY = ("vae_branch", "pathway", "position_mlp")


@dataclass(frozen=True)
class Saved:
    """How a folder is made. On three ranks hardly any size can be shared evenly, so there is padding everywhere."""

    stage: int
    world: int
    dtype: str = "float32"
    without_frozen: bool = False
    trains: tuple[str, ...] = BRIDGE_ONLY

    @property
    def case(self) -> Case:
        return Case(trains=self.trains, dtype=self.dtype, clip=1e9)


@dataclass
class Content:
    """What DeepSpeed says is in a folder, as arrays: by the module's names. after: weights one step later."""

    weights: dict[str, np.ndarray] = field(default_factory=dict)
    moments: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    frozen: dict[str, np.ndarray] = field(default_factory=dict)
    after: dict[str, np.ndarray] = field(default_factory=dict)


class Users(nn.Module):
    """Has the model's parts under names of its own, and something besides."""

    def __init__(self, model: nn.Module, loss: FlowMatchingLoss):
        super().__init__()
        self.wemmu = nn.ModuleDict({"bridge": model.bridge, "dit": model.dit})
        self.extra = nn.Linear(3, 5).to(next(model.dit.parameters()).dtype).requires_grad_(False)
        self._loss = loss

    def forward(self, batch: Batch, step: int) -> Losses:
        return self._loss(batch, step)


def save_folder(rank: int, world: int, out: Path, backbones: Backbones, saved: Saved) -> Content:
    """Train two steps with DeepSpeed, save, train another; a rank's work, see `tests.parallel.ranks`."""
    deepspeed = load_deepspeed(torch.device("cpu"))
    run = saved.case.run
    model = saved.case.model(backbones)
    module = Users(model, FlowMatchingLoss(model, run))
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in module.named_parameters():
        if p.requires_grad:
            groups.setdefault(run.rates(name.removeprefix("wemmu."), p.ndim), []).append(p)
    adamw = torch.optim.AdamW(
        [{"params": ps, "lr": lr, "weight_decay": decay} for (lr, decay), ps in groups.items()],
        betas=run.stage.optimizer.betas,
    )
    config = {
        "bf16": {"enabled": saved.dtype == "bfloat16"},
        # So small that the parameters come in several sub-groups.
        "zero_optimization": {"stage": saved.stage, "sub_group_size": 200_000},
        "gradient_clipping": 0.0,
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=module, optimizer=adamw, config=config, dist_init_required=False)
    encoder = PromptEncoder(backbones.vlm)

    def step(number: int) -> None:
        ids = [100 * number + i for i in range(world * (GLOBAL_BATCH // world))]
        (batch,) = micro_batches(encoder, ids, EDIT, rank, world, 1)
        engine.backward(engine(batch, number).values.sum() * (world / GLOBAL_BATCH))
        engine.step()

    for number in range(STEPS):
        step(number)
    if saved.stage < 3:
        # It was done when the first group had stepped, and the others had no moments yet (DeepSpeed 0.19.8).
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    engine.save_checkpoint(str(out), tag=TAG, exclude_frozen_parameters=saved.without_frozen)
    content = _content(deepspeed, module)
    step(STEPS)
    content.after = _content(deepspeed, module).weights
    return content


def universal(folder: Path, out: Path) -> None:
    """What `python -m deepspeed.checkpoint.ds_to_universal` makes of a folder, in this process."""
    from deepspeed.checkpoint import ds_to_universal

    # Without it, folders of DeepSpeed alone, which lack Megatron's part of the state, are refused.
    asked = {"inject_missing_state": True, "keep_temp_folder": False, "strict": True}
    workers = {"num_extract_workers": 1, "num_merge_workers": 1}
    ds_to_universal.main(SimpleNamespace(input_folder=str(folder / TAG), output_folder=str(out), **workers, **asked))


def _content(deepspeed, module: nn.Module) -> Content:
    utils, content = deepspeed.utils, Content()
    for name, p in module.named_parameters():
        if p.requires_grad:
            content.weights[name] = _array(utils.safe_get_full_fp32_param(p))
            moments = {m: utils.safe_get_full_optimizer_state(p, m) for m in ("exp_avg", "exp_avg_sq")}
            content.moments[name] = {m: _array(t) for m, t in moments.items()}
        else:
            with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
                content.frozen[name] = _array(p.detach())
    return content


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.float().numpy().copy()
