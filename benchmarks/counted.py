"""Kernels launched and bytes moved by a training step, counted without computing it; needs no GPU.

    python -m benchmarks.counted                       # the published sizes in bfloat16, stage 1 and 2, text to image
    python -m benchmarks.counted --size middle --edits

Every operator that is no view counts as one kernel, which reads its arguments and writes its results. So this is the
eager step: what a compiler fuses moves less, and a product whose operands fit into a cache moves less, too.
"""

from collections import Counter
from dataclasses import replace
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.step_profile import kind_of
from benchmarks.step_sizes import SIZES, Cell, Size, make_batch, make_model, make_run
from benchmarks.step_variants import PLAIN, our_steps
from wemmu.config.task import Task
from wemmu.measuring.fake_world import FakeWorld, fake_world
from wemmu.measuring.operators import tensors
from wemmu.recipes.wemmu.model import WeMMU

# They allocate and launch nothing.
ALLOCATE = ("empty", "_local_scalar_dense", "set_", "resize_")
# What is counted, each with what came before.
VARIANTS = ("plain", "fused norms", "noise drawn on the device", "narrow linear attention")


class Counting(FakeWorld):
    """launches, bytes: by kind of operator, since they were last cleared."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        out, schema = super()._run(func, args, kwargs), func._schema
        name = schema.name
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        if not view and not any(part in name for part in ALLOCATE):
            kind = kind_of(name)
            self.launches[kind] += 1
            found = [*tensors(args), *tensors(kwargs.values()), *tensors((out,))]
            self.bytes[kind] += sum(x.numel() * x.element_size() for x in found)
        return out


@torch.library.custom_op("benchmarks::norm", mutates_args=())
def norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """One kernel: the norm of x, and 1 / rms in float32."""
    raise NotImplementedError("counted, not computed")


@torch.library.custom_op("benchmarks::norm_backward", mutates_args=())
def norm_backward(gradient: Tensor, x: Tensor, inverse: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("counted, not computed")


norm.register_fake(lambda x, weight: (torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)))
norm_backward.register_fake(lambda gradient, x, inverse, weight: (torch.empty_like(x), torch.empty_like(weight)))


class FusedNorm(torch.autograd.Function):
    """What torch's norm launches on a GPU; on a CPU it is taken apart before anybody sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        y, inverse = norm(x, weight)
        ctx.save_for_backward(x, inverse, weight)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return norm_backward(gradient, *ctx.saved_tensors)


def counted(size: Size, cell: Cell, variant: str) -> tuple[Counter[str], Counter[str]]:
    """By kind: kernels and bytes of the second step, which makes no moments."""
    run, device = make_run(cell, "single", "bfloat16"), torch.device("cpu")
    mode = Counting()
    with fake_world(mode):
        model = make_model(size, device, torch.bfloat16)
        if variant != VARIANTS[0]:
            fuse(model)
        (own,) = PLAIN.values()
        if variant in VARIANTS[2:]:
            changed = {"noise": "device", "narrow_attention": variant == VARIANTS[3]}
            own = replace(own, kernels=own.kernels.model_copy(update=changed))
        batch = make_batch(size, cell, model.vlm.token_px)
        (step,) = our_steps(model, run, batch, {"ours": own}, device).values()
        step()
        mode.launches, mode.bytes = Counter(), Counter()
        step()
    return mode.launches, mode.bytes


def fuse(model: WeMMU) -> None:
    language = model.vlm.language_model
    for part in (language, model.bridge.pathway):
        for module in part.modules():
            if type(module) is type(language.norm):
                module.forward = lambda x, m=module: FusedNorm.apply(x, m.weight)


def main(
    size: Annotated[str, typer.Option(help=", ".join(SIZES))] = "real",
    edits: Annotated[bool, typer.Option(help="edits, too")] = False,
    samples: Annotated[int | None, typer.Option(help="of a micro-batch, instead of the size's own")] = None,
) -> None:
    found = SIZES[size]()
    for cell in found.cells:
        if cell.task != Task.T2I and not edits:
            continue
        cell = cell if samples is None else cell.of(samples)
        for variant in VARIANTS:
            launches, moved = counted(found, cell, variant)
            print(f"\n{cell.name}, {variant}: {sum(launches.values())} kernels, {sum(moved.values()) / 1e9:.1f} GB")
            for kind, number in launches.most_common():
                print(f"  {kind:24} {number:7} {moved[kind] / 1e9:9.1f} GB", flush=True)


if __name__ == "__main__":
    typer.run(main)
