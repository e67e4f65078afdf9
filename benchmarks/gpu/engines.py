"""Losses, gradients and weights of small stages on a device: against the CPU's, and of one engine against another's."""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gpu.verdict import Row, Setting, tried, within
from benchmarks.measure import ROOT
from tests.models.world import random_images
from tests.parallel.cases import (
    ALL,
    EDIT,
    GLOBAL_BATCH,
    MULTI,
    T2I,
    Case,
    Outcome,
    RossCase,
    distances,
    go,
    merged,
    portable,
)
from tests.parallel.ranks import RankError, on_ranks
from wemmu import kernels
from wemmu.config import StageRun, Task, load_curriculum
from wemmu.config.schema import Backbones
from wemmu.parallel.engine import Engine
from wemmu.parallel.topology import ALONE, Topology
from wemmu.recipes.recipe import ready_to_train, recipe
from wemmu.recipes.uae.config import UAE
from wemmu.recipes.uae.recipe import UAERecipe
from wemmu.training.build import give_kernels, make_engine
from wemmu.types import Batch, LossFn

BACKBONES = Backbones.model_validate({"vlm": ROOT / "assets/shapes/vlm", "sana": ROOT / "assets/shapes/sana"})
CASES = {
    "WeMMU, stage 1": Case(trains=ALL[:3], kind="contrastive", tasks=(T2I,)),
    "WeMMU, edits": Case(tasks=(EDIT, MULTI), ema=0.9),
    "ROSS, denoiser": RossCase(),
    "ROSS, MLP": RossCase(head={"kind": "mlp"}),
}
# Of two ranks: tp, pp.
LAYOUTS = {"pipeline, pp 2": (1, 2), "tensor layers, tp 2": (2, 1)}
# Of float32 on two devices or engines: sums in another order. Weights: AdamW divides a gradient by its own size, so an
# element that is all rounding moves by a whole step.
BOUNDS = {"losses": 1e-4, "norms": 1e-4, "gradients": 1e-3, "weights": 1e-3}
# How much farther from float32 the device's bfloat16 may be than the CPU's.
ROUNDING = 1.5


def exactly(device: str) -> torch.device:
    """The device, on which float32 is computed in float32: convolutions would round to 10 bits otherwise."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if device == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)


def outcome(
    case: Case, device: torch.device, engine: str = "single", world: Topology = ALONE, compile: bool = False
) -> Outcome:
    def make(model: Any, loss: LossFn, run: StageRun) -> Engine:
        run = run.changed({"parallel.engine": engine, "kernels.compile": compile})
        compiled = give_kernels(run, model, device)[1] if compile else ()
        return make_engine(run, model, loss, world, device, compiled=compiled)

    return go(case, BACKBONES, make, world.rank, world.world, device)


def uae(device: torch.device, dtype: str) -> Outcome:
    """Losses and gradients of captions that were sampled and rewarded on the CPU in float32."""
    changed = ["stages.reward.objective.temperature=2", "recipe.generator.steps=1", "recipe.max_length=16"]
    run = load_curriculum(ROOT / "configs" / "shapes" / "uae.yaml", changed).stage_run("reward")
    made, own = recipe(run), run.recipe
    assert isinstance(made, UAERecipe)
    assert isinstance(own, UAE)
    ready_to_train(made, run)
    images = random_images(0, GLOBAL_BATCH, 1, 3, 64, 64)
    prompts = made.policy.encode([own.instruction] * GLOBAL_BATCH, images)
    batch = Batch(Task.CAPTION, torch.arange(GLOBAL_BATCH), prompts, images, target=None)
    (prepared,) = made.prepare([batch], 0).batches
    narrow = getattr(torch, dtype)
    made.model.to(device, narrow)
    losses = made.loss(prepared.to(device), 0)
    losses.values.sum().backward()
    gradients = {n: p.grad for n, p in made.model.named_parameters() if p.grad is not None}
    return merged([Outcome([dict(enumerate(losses.values.tolist()))], portable(gradients), [], {})])


def compared(name: str, ours: Outcome, theirs: Outcome) -> Iterator[Row]:
    for part, (worst, place) in distances(ours, theirs).items():
        yield within(f"{name}: {part}", worst, BOUNDS[part], place)


def some(setting: Setting, of: dict[str, Any]) -> dict[str, Any]:
    """All on a GPU; on a CPU, where the point is that the code runs, the first alone."""
    return of if setting.real else dict(list(of.items())[:1])


def parity(setting: Setting) -> Iterator[Row]:
    """float32 on the device equals the CPU's; bfloat16 is about as far from float32 as the CPU's bfloat16."""
    device, cpu = exactly(setting.device), torch.device("cpu")

    def case_parity(name: str, case: Case) -> Iterator[Row]:
        exact = merged([outcome(case, cpu)])
        yield from compared(f"{name}, float32", merged([outcome(case, device)]), exact)
        narrow = replace(case, dtype="bfloat16")
        yield from rounded(name, merged([outcome(narrow, device)]), merged([outcome(narrow, cpu)]), exact)

    def uae_parity() -> Iterator[Row]:
        exact = uae(cpu, "float32")
        for part, off in off_by(uae(device, "float32"), exact).items():
            yield within(f"UAE, float32: {part}", off, BOUNDS[part])
        yield from rounded("UAE", uae(device, "bfloat16"), uae(cpu, "bfloat16"), exact)

    for name, case in some(setting, CASES).items():
        yield from tried(name, case_parity(name, case))
    yield from tried("UAE", uae_parity())


def rounded(name: str, here: Outcome, there: Outcome, exact: Outcome) -> Iterator[Row]:
    """Rows of bfloat16 on the device, whose bound is that of the CPU, there."""
    ours, theirs = off_by(here, exact), off_by(there, exact)
    for part, off in ours.items():
        yield within(f"{name}, bfloat16: {part} off float32", off, ROUNDING * max(theirs[part], 2**-9))


def off_by(narrow: Outcome, exact: Outcome) -> dict[str, float]:
    """The distance of all losses and of all gradients, as two vectors, relative."""

    def relative(a: Tensor, b: Tensor) -> float:
        return float((a - b).norm() / b.norm())

    losses = [torch.tensor([v for step in o.losses for _, v in sorted(step.items())]) for o in (narrow, exact)]
    gradients = [torch.cat([o.gradients[n].flatten() for n in sorted(exact.gradients)]) for o in (narrow, exact)]
    return {"losses": relative(*losses), "gradients": relative(*gradients)}


def zero3(setting: Setting) -> Iterator[Row]:
    """One rank: DeepSpeed's gathering, reducing and flat optimizer, with NCCL on a GPU."""
    device, backend = exactly(setting.device), "cpu:gloo,cuda:nccl" if setting.real else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        for name, case in some(setting, CASES).items():
            yield from tried(name, _zero3(name, case, device))
        if setting.real and not kernels.no_compiling(device):
            name, case = next(iter(CASES.items()))
            yield from tried(f"{name}, compiled", _zero3(f"{name}, compiled", case, device, compile=True))
        dist.destroy_process_group()


def _zero3(name: str, case: Case, device: torch.device, compile: bool = False) -> Iterator[Row]:
    theirs = merged([outcome(case, device)])
    yield from compared(name, merged([outcome(case, device, "zero3", compile=compile)]), theirs)


def hybrid(setting: Setting) -> Iterator[Row]:
    """Two ranks that share the device, over gloo, since NCCL refuses two ranks on one GPU."""
    case, device = Case(tasks=(EDIT, T2I)), exactly(setting.device)
    theirs = merged([outcome(case, device)])
    for name, (tp, pp) in some(setting, LAYOUTS).items():
        try:
            # A back end that waits for ever leaves time for the other layout.
            ranks = on_ranks(2, _rank, case, setting.device, tp, pp, timeout=90 if setting.real else 240)
        except RankError as error:
            why = str(error).strip().splitlines()[-1]
            lacks = "gloo" in why.lower() or "No backend type associated" in why
            yield Row(name, why, "cannot" if lacks else "off")
            continue
        yield from compared(name, merged(ranks), theirs)


def _rank(rank: int, world: int, case: Case, device: str, tp: int, pp: int) -> Outcome:
    return outcome(case, exactly(device), "hybrid", Topology(rank, world, tp, pp))
