"""Cases on which engines must agree: a stage's settings, a global batch a step, and what comes out of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.models.world import SMALL_HEAD, awake, make_model, make_ross, micro_batches
from tests.training.runs import STAGE_RUN
from wemmu.backbones.quantized import pack
from wemmu.checkpoint.sharded_tensor import ShardedTensor
from wemmu.config import StageRun
from wemmu.config.lora import LoRA
from wemmu.config.schema import Backbones
from wemmu.config.stage import Optimizer
from wemmu.config.task import Task
from wemmu.parallel.engine import Engine
from wemmu.parallel.single import SingleEngine
from wemmu.prompts import PromptEncoder
from wemmu.recipes.lora import adapt
from wemmu.recipes.ross.config import ReconstructiveTuning
from wemmu.recipes.ross.config import Ross as RossConfig
from wemmu.recipes.ross.loss import ReconstructiveLoss
from wemmu.recipes.ross.model import Ross
from wemmu.recipes.wemmu.loss import FlowMatchingLoss
from wemmu.recipes.wemmu.model import WeMMU
from wemmu.types import LossFn

ALL = ("vae_branch", "pathway", "position_mlp", "dit")
T2I, EDIT, MULTI = Task.T2I, Task.EDIT, Task.MULTI_EDIT
GLOBAL_BATCH = 4
CPU = torch.device("cpu")
# The bias of the keys of cross-attention adds the same to every score of a query, which softmax ignores: its gradient
# is rounding. AdamW makes steps of full size of it, which change nothing.
NO_GRADIENT = "attn2.to_k.bias"


@dataclass(frozen=True)
class Case:
    """tasks: of each step; accumulation: micro-batches of a rank in a step."""

    trains: tuple[str, ...] = ALL
    kind: str = "flow"
    tasks: tuple[Task, ...] = (EDIT,)
    design: str = "noisy"
    vae_branch: bool = True
    accumulation: int = 1
    dtype: str = "float32"
    clip: float = 1.0
    ema: float | None = None
    noise: str = "host"
    # Of a question, by step; the last one counts for all further steps.
    images: tuple[int, ...] = (1,)
    # Modules that learn by adapters.
    lora: tuple[str, ...] = ()
    # Whether the frozen VLM is in 4 bit.
    packed: bool = False

    @property
    def run(self) -> StageRun:
        optimizer = Optimizer(
            lr=1e-3, module_lr={"dit": 4e-4}, vector_scale=3.0, weight_decay=0.1, clip=self.clip, ema_decay=self.ema
        )
        return STAGE_RUN.changed(
            {
                "stage.optimizer": optimizer,
                "stage.objective.kind": self.kind,
                "stage.objective.weight": 0.2,
                "stage.global_batch": GLOBAL_BATCH,
                "stage.trains": self.trains,
                "backbones.dtype": self.dtype,
                "kernels.noise": self.noise,
                "recipe.lora": self.adapters,
            }
        )

    @property
    def adapters(self) -> dict[str, LoRA]:
        return {module: LoRA(rank=3, alpha=6.0) for module in self.lora}

    def model(self, backbones: Backbones) -> WeMMU:
        model = make_model(backbones.model_copy(update={"dtype": self.dtype}), self.design, self.vae_branch)
        adapt(model, self.run.recipe, seed=3)
        model.freeze_all_but(self.trains)
        if self.packed:
            pack(model.vlm.vlm, "nf4")
        return model.train()

    def loss(self, model: WeMMU) -> LossFn:
        return FlowMatchingLoss(model, self.run)


@dataclass(frozen=True)
class RossCase(Case):
    """A stage of reconstructive tuning."""

    trains: tuple[str, ...] = ("projector", "llm", "head")
    tasks: tuple[Task, ...] = (Task.UNDERSTANDING,)
    head: dict[str, Any] = field(default_factory=lambda: SMALL_HEAD)

    @property
    def run(self) -> StageRun:
        objective = ReconstructiveTuning(kind="reconstructive", weight=0.5)
        recipe = RossConfig.model_validate({"head": self.head, "lora": self.adapters})
        return super().run.changed({"stage.objective": objective, "recipe": recipe})

    def model(self, backbones: Backbones) -> Ross:
        model = make_ross(backbones.model_copy(update={"dtype": self.dtype}), head=self.head)
        awake(model.head, std=0.05)
        adapt(model, self.run.recipe, seed=3)
        model.freeze_all_but(self.trains)
        return model.train()

    def loss(self, model: Ross) -> LossFn:
        return ReconstructiveLoss(model, self.run)


STAGES = {
    "stage1": Case(trains=ALL[:3], kind="contrastive", tasks=(T2I, Task.RECONSTRUCTION)),
    "stage2": Case(tasks=(T2I, Task.RECONSTRUCTION)),
    "stage3": Case(tasks=(EDIT, T2I, EDIT)),
    "stage4": Case(tasks=(MULTI, Task.UNCONDITIONAL), ema=0.9),
}
DESIGNS = {
    design: Case(trains=("pathway", "position_mlp", "queries", "dit"), design=design, vae_branch=False)
    for design in ("learnable_fixed", "learnable_dynamic")
}


@dataclass
class Outcome:
    """losses: step -> sample -> loss. gradients: of the first step, before clipping. norms: of each step. weights: at
    the end, and their moving averages, if there are any, under `ema.`."""

    losses: list[dict[int, float]] = field(default_factory=list)
    gradients: dict[str, Any] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Any] = field(default_factory=dict)


MakeEngine = Callable[[nn.Module, LossFn, StageRun], Engine]


class Run:
    """Training of a case on one rank, on `device`, where `make` puts the model; its tasks come by turns."""

    def __init__(
        self,
        case: Case,
        backbones: Backbones,
        make: MakeEngine,
        rank: int = 0,
        world: int = 1,
        device: torch.device = CPU,
    ):
        self.case, self.model, self.encoder = case, case.model(backbones), PromptEncoder(backbones.vlm)
        self.engine = make(self.model, case.loss(self.model), case.run)
        self._place, self._device = (rank, world), device

    def accumulate(self, step: int) -> dict[int, float]:
        """Losses of this rank's samples of a step."""
        case, ids = self.case, [100 * step + i for i in range(GLOBAL_BATCH)]
        task, images = case.tasks[step % len(case.tasks)], case.images[min(step, len(case.images) - 1)]
        batches = micro_batches(self.encoder, ids, task, *self._place, case.accumulation, images)
        losses = self.engine.accumulate([batch.to(self._device) for batch in batches], step)
        values = torch.cat([one.values for one in losses]).tolist()
        return dict(zip((i for batch in batches for i in batch.sample_ids.tolist()), values, strict=True))

    def steps(self, first: int, count: int) -> list[dict[int, float]]:
        """Take steps; the losses of each."""
        found = []
        for step in range(first, first + count):
            found.append(self.accumulate(step))
            self.engine.step(1.0)
        return found


def go(
    case: Case, backbones: Backbones, make: MakeEngine, rank: int = 0, world: int = 1, device: torch.device = CPU
) -> Outcome:
    """Train a step for each of the case's tasks. Tensors come as parts, see `portable`."""
    run, outcome = Run(case, backbones, make, rank, world, device), Outcome()
    for step in range(len(case.tasks)):
        outcome.losses.append(run.accumulate(step))
        if step == 0:
            outcome.gradients = portable(run.engine.gradients())
        outcome.norms.append(float(run.engine.step(1.0)))
    state = run.engine.state()
    outcome.weights = portable(state.weights | {f"ema.{name}": tensor for name, tensor in state.ema.items()})
    return outcome


def gradient_distance(one: Outcome, other: Outcome) -> float:
    """Between the whole gradients, relative."""
    a, b = (torch.cat([o.gradients[name].flatten() for name in sorted(o.gradients)]) for o in (one, other))
    return float((a - b).norm() / b.norm())


def single(case: Case, backbones: Backbones) -> Outcome:
    return go(
        case, backbones,
        lambda model, loss, run: SingleEngine(model, loss, run),
    )  # fmt: skip


def portable(tensors: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], list]]:
    """name -> (whole shape, [(index of the whole tensor, numpy array)])."""
    return {
        name: (tuple(t.shape), [(at, part.float().cpu().numpy().copy()) for at, part in ShardedTensor.of(t).places])
        for name, t in tensors.items()
    }


def whole(ranks: list[dict[str, tuple[tuple[int, ...], list]]]) -> dict[str, Tensor]:
    """The tensors that the ranks hold parts of. Every element must be held; what several hold must be equal."""
    found: dict[str, Tensor] = {}
    for held in ranks:
        for name, (shape, parts) in held.items():
            tensor = found.setdefault(name, torch.full(shape, torch.nan))
            for at, part in parts:
                place, values = tensor[at], torch.from_numpy(part)
                assert torch.equal(torch.where(place.isnan(), values, place), values), f"{name}: ranks differ"
                place.copy_(values)
    assert not [name for name, tensor in found.items() if tensor.isnan().any()]
    return found


def merged(ranks: list[Outcome]) -> Outcome:
    losses = [{i: v for rank in ranks for i, v in rank.losses[step].items()} for step in range(len(ranks[0].losses))]
    assert all(rank.norms == ranks[0].norms for rank in ranks), "the ranks do not agree on the norm"
    return Outcome(losses, whole([r.gradients for r in ranks]), ranks[0].norms, whole([r.weights for r in ranks]))


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor], floor: float) -> tuple[float, str]:
    """The largest difference of a tensor relative to its own size, and its name.

    Sizes are norms. A tensor is at least as large as `floor` x the largest root mean square of an element among all
    tensors would make it: a gradient that is zero but for rounding cannot be compared with itself.
    """
    assert ours.keys() == theirs.keys()
    typical = max(float(t.square().mean().sqrt()) for t in theirs.values())
    return max(
        (
            float(
                ((ours[n] - t).norm() / max(float(t.norm()), floor * typical * t.numel() ** 0.5)).nan_to_num(math.inf)
            ),
            n,
        )
        for n, t in theirs.items()
    )


def distances(ours: Outcome, theirs: Outcome, floor: float = 1e-4) -> dict[str, tuple[float, str]]:
    """How far `ours` is off `theirs`: losses, norms, gradients, weights -> (the largest relative distance, its place).

    Parameters whose gradient is zero but for rounding are left out; see `difference` for the floor.
    """
    assert [one.keys() for one in ours.losses] == [one.keys() for one in theirs.losses]

    def off(a: float, b: float) -> float:
        relative = abs(a / b - 1)
        return math.inf if math.isnan(relative) else relative

    steps = enumerate(zip(ours.losses, theirs.losses, strict=True))
    losses = [(off(one[i], other[i]), f"step {step}, sample {i}") for step, (one, other) in steps for i in other]
    norms = [(off(a, b), f"step {step}") for step, (a, b) in enumerate(zip(ours.norms, theirs.norms, strict=True))]
    found = {"losses": max(losses), "norms": max(norms)}
    for part in ("gradients", "weights"):
        real = {name: t for name, t in getattr(theirs, part).items() if not name.endswith(NO_GRADIENT)}
        found[part] = difference({name: getattr(ours, part)[name] for name in real}, real, floor)
    return found
