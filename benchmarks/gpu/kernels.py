"""Each kernel that a GPU may take against the plain one, and a step with compiled layers against one without."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, SupportsFloat

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.engines import BACKBONES, exactly, off_by
from benchmarks.gpu.verdict import Row, Setting, tried, within
from tests.parallel.cases import EDIT, Case, Outcome, go, merged
from wemmu import kernels as ours
from wemmu.config import StageRun
from wemmu.config.schema import Kernels as KernelsConfig
from wemmu.kernels import ADAMW_BOUND, ATTENTION, NORM_BOUND
from wemmu.noise import Noise
from wemmu.parallel.single import SingleEngine
from wemmu.training.build import give_kernels
from wemmu.types import Batch, Losses, LossFn

# Of attention in bfloat16, relative to the norm: probabilities are rounded before they are multiplied, 2^-9 each.
ATTENTION_BOUND = 2**-7
# Of losses and gradients with compiled layers, which round less often: times the distance of plain ones from float32.
COMPILED = 1.5
# What torch warns of where the host waits; it also warns, once, that not every place is found.
WAIT = "called a synchronizing CUDA operation"
# Normal numbers of two devices differ in the last bits of logarithm and cosine.
NORMAL_BOUND = 1e-5


def kernels(setting: Setting) -> Iterator[Row]:
    device = exactly(setting.device)
    for check in (fused, attention, noise, *((waits,) if setting.real else ()), compiled):
        yield from tried(check.__name__, check(device))


def fused(device: torch.device) -> Iterator[Row]:
    """What is chosen here; norms and optimizers."""
    yield Row("chosen", str(ours.choose(KernelsConfig(), "single", device, torch.bfloat16, 128)))
    apex, problem = ours.find_apex()
    if problem:
        yield Row("Apex", problem)
    for dtype in NORM_BOUND:
        for name, norm in ours.norm_kernels(apex).items():
            off = ours.norm_difference(norm, device, dtype)
            yield within(f"norm of {name}, {dtype}", off, NORM_BOUND[dtype])
    off = ours.adamw_difference(partial(torch.optim.AdamW, fused=True), device)
    yield within("torch's fused AdamW", off, ADAMW_BOUND)
    if apex:
        yield within("Apex's FusedAdam", ours.adamw_difference(ours.fused_adam(), device), ADAMW_BOUND)


def attention(device: torch.device) -> Iterator[Row]:
    """Each kernel that runs here, with and without padding, forward and in its gradients, against float32."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 8, 256, 64, generator=generator).to(device) for _ in range(4)]
    padding = torch.zeros(2, 1, 1, 256, dtype=torch.bool)
    padding[0, ..., :200] = padding[1] = True
    for masked in (False, True):
        mask = padding.to(device).expand(2, 1, 256, 256) if masked else None
        exact = attended(SDPBackend.MATH, inputs, mask, torch.float32)
        narrow = None if mask is None else mask[:1, :, :64, :64].to(torch.bfloat16)
        names = ours.attention_kernels(device, torch.bfloat16, narrow)

        def off(
            what: str, backend: SDPBackend, mask: Tensor | None = mask, exact: list[Tensor] = exact
        ) -> Iterator[Row]:
            found = attended(backend, inputs, mask, torch.bfloat16)
            worst = max(float((a.float() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
            yield within(what, worst, ATTENTION_BOUND)

        for backend, name in ATTENTION.items():
            what = f"attention, {name}{', padded' * masked}"
            if name in names:
                # Forward is known to run; one whose backward pass does not leaves the rows of the others.
                yield from tried(what, off(what, backend))
            else:
                yield Row(what, "does not run here", "told")


def attended(backend: SDPBackend, inputs: list[Tensor], mask: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """Attention with its three gradients."""
    *leaves, gradient = (x.to(dtype) for x in inputs)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    with sdpa_kernel(backend):
        q, k, v = leaves
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]


def noise(device: torch.device) -> Iterator[Row]:
    """Random numbers that the device draws are those that the CPU draws by the same key."""
    here, there = (
        Noise(0, 5, torch.tensor([3, 2**40 + 7]), place, "device").normal("queries", (1000, 7)).cpu()
        for place in (device, "cpu")
    )
    yield within("noise drawn on the device, largest difference", float((here - there).abs().max()), NORMAL_BOUND)


def waits(device: torch.device) -> Iterator[Row]:
    """Where the host waits for the device within a step, by torch's own warnings."""
    # Noise as training draws it on a GPU: the host's own is waited for.
    case = Case(tasks=(EDIT, EDIT, EDIT), dtype="bfloat16", noise="auto")

    class Watched(SingleEngine):
        taken = 0

        def accumulate(self, micro_batches: Sequence[Batch], step: int) -> list[Losses]:
            self.taken += 1
            # The first steps make what later ones find.
            torch.cuda.set_sync_debug_mode("warn" if self.taken == 3 else "default")
            return super().accumulate(micro_batches, step)

        def step(self, lr_share: float) -> SupportsFloat:
            norm = super().step(lr_share)
            torch.cuda.set_sync_debug_mode("default")
            return norm

    def make(model: nn.Module, loss: LossFn, run: StageRun) -> SingleEngine:
        return Watched(model.to(device), loss, run)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        go(case, BACKBONES, make, device=device)
    # Between the two halves of a step the caller of this test reads the losses.
    waiting = [one for one in told if WAIT in str(one.message) and not one.filename.endswith("cases.py")]
    places = sorted({f"{one.filename.rsplit('/', 1)[-1]}:{one.lineno}" for one in waiting})
    found = f"at {len(places)} places: {', '.join(places)}" if places else "nowhere"
    yield Row("the host waits within a step", found, "off" if places else "ok")


def compiled(device: torch.device) -> Iterator[Row]:
    """A step with every layer compiled is as far from float32 as one with plain layers."""
    if why := ours.no_compiling(device):
        yield Row("compiled layers", why, "cannot")
        return
    case = Case(tasks=(EDIT,), dtype="bfloat16")
    exact = merged([_step(replace(case, dtype="float32"), device, False)])
    plain, fast = (off_by(merged([_step(case, device, how)]), exact) for how in (False, True))
    for part, off in fast.items():
        yield within(f"compiled layers: {part} off float32", off, COMPILED * max(plain[part], 2**-9))


def _step(case: Case, device: torch.device, compiled: bool) -> Outcome:
    def make(model: Any, loss: LossFn, run: StageRun) -> SingleEngine:
        changed = {f"kernels.{name}": compiled for name in ("fused_norms", "narrow_attention", "compile")}
        give_kernels(run.changed(changed), model.to(device), device)
        return SingleEngine(model, loss, run)

    return go(case, BACKBONES, make, device=device)
