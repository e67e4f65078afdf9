"""A step of ours and of the naive way, and sampling: at the published sizes on a GPU, else the miniature's."""

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.verdict import Row, Setting, State, met, tried
from benchmarks.measure import watch
from benchmarks.step import Settings, apart, peak_of
from benchmarks.step_sizes import FIRST_WORD, Cell, make_curriculum, make_model, prompts_of
from benchmarks.step_variants import CHANNELS_LAST, DETERMINISTIC, PLAIN, counted_flops
from wemmu.config.schema import Sampling
from wemmu.config.task import Task
from wemmu.planning.layout import Degrees
from wemmu.planning.plan import Assumptions, Machine, plan
from wemmu.sampling.request import GenerationRequest
from wemmu.sampling.sampler import Sampler
from wemmu.types import Prompts

# Samples of a micro-batch of each cell that fill a GPU with this much memory, in GiB; a smaller one has the size's own.
LARGE, SAMPLES = 120, (12, 8, 3, 2)
ROUNDS = 7
# Of one rank, beside `single`: what the hooks of DeepSpeed and of FSDP2 cost. Text to image, stage 1.
ENGINES = ("zero3", "hybrid")
# Variants that fit into one process; those that are compared stand beside each other.
GROUPS = (("ours", "ours, checkpointing"), ("naive",), tuple(PLAIN), tuple(CHANNELS_LAST), tuple(DETERMINISTIC))
# MFU; times of the naive step; how far the plan's memory may be off the measured peak.
GOAL, GOAL_EDIT, FASTER, NEAR = 0.40, 0.35, 1.5, 0.10
# The published models that the size `real` is made like, by the names that a plan knows.
PUBLISHED = {"vlm": "Qwen2.5-VL-3B-Instruct", "sana": "Sana_1600M_1024px_diffusers", "dtype": "bfloat16"}
SOLVER_STEPS = (10, 20, 30)


def settings_of(setting: Setting) -> tuple[Settings, list[Cell]]:
    size, dtype = ("real", "bfloat16") if setting.real else ("miniature", "float32")
    settings = Settings(size, setting.device, dtype, "single", None, None)
    cells = settings.cells()
    if setting.real and torch.cuda.get_device_properties(0).total_memory > LARGE * 2**30:
        cells = [cell.of(samples) for cell, samples in zip(cells, SAMPLES, strict=True)]
    # Text to image first: if time ends, it ends on the rest.
    return settings, sorted(cells, key=lambda cell: cell.task != Task.T2I)


def steps(setting: Setting) -> Iterator[Row]:
    """Each cell: ours with and without checkpointing, the naive one, ours with plain and deterministic kernels; then
    other engines on one rank, with the kernels that training takes and with plain ones."""
    settings, cells = settings_of(setting)
    cells, groups = (cells, GROUPS) if setting.real else (cells[:1], GROUPS[:2])
    rounds = ROUNDS if setting.real else 1
    with ProcessPoolExecutor(1 + len(cells) if setting.real else 1, multiprocessing.get_context("spawn")) as counting:
        counted = [counting.submit(counted_flops, settings.load(), cell, ["ours"]) for cell in cells]
        earlier = {row.name: row.value for row in setting.earlier}
        begun, longest = time.monotonic(), dict[Sequence[str], float]()
        waiting: list[Planned] = []
        jobs = [("single", group, number) for group, number in in_order(groups, cells)]
        jobs += [(engine, group, 0) for engine in ENGINES for group in (("ours",), tuple(PLAIN))]
        for engine, group, number in jobs:
            cell, before = cells[number], time.monotonic()
            names = {variant: named(variant, engine) for variant in group}
            if all(f"{cell.name}: {name}" in earlier for name in names.values()):
                continue
            what = f"{cell.name}: {', '.join(names.values())}"
            if before + longest.get(group, max(longest.values(), default=0.0)) - begun > setting.seconds:
                yield Row(what, "not run: the time is up", "left")
                continue

            # Beside what it is compared with, so that none is under way when the time is up.
            mine = setting.real and engine == "single" and "ours" in names
            plans = counting.submit(planned, cell, settings.load().text) if mine else None

            def measured(
                engine: str = engine,
                cell: Cell = cell,
                names: dict[str, str] = names,
                number: int = number,
                plans: "Future[dict[str, float]] | None" = plans,
            ) -> Iterator[Row]:
                own = replace(settings, engine=engine)
                # The profiler takes minutes for DeepSpeed's hooks.
                variants = apart(own, cell, list(names), rounds, profile=engine == "single")
                flops = counted[number].result()["ours"]
                found = [row(cell, names[variant], one, flops, setting.real) for variant, one in variants.items()]
                yield from found
                earlier.update({one.name: one.value for one in found})
                yield from ratios(cell, tuple(names.values()), earlier, setting.real)
                if plans is not None:
                    waiting.append((cell, variants, plans))

            yield from tried(what, measured())
            longest[group] = max(longest.get(group, 0.0), time.monotonic() - before)
            yield from by_plans(waiting, 0.0)
        yield from by_plans(waiting, max(0.0, begun + setting.seconds - time.monotonic()))
        yield from (Row(f"{cell.name}: the plan", "not run: the time is up", "left") for cell, *_ in waiting)


def named(variant: str, engine: str) -> str:
    return variant if engine == "single" else f"{variant}, {engine} on one rank"


def in_order(groups: Sequence[Sequence[str]], cells: Sequence[Cell]) -> list[tuple[Sequence[str], int]]:
    """Groups of variants with the numbers of their cells: first what is compared with the naive step, text to image.

    Plain kernels and channels_last are for text to image. The price of determinism is that of operations that all
    cells share, so one cell has it.
    """
    jobs = [
        (place, n)
        for place, group in enumerate(groups)
        for n, cell in enumerate(cells)
        if place < 2 or (n == 0 if group == tuple(DETERMINISTIC) else cell.task == Task.T2I)
    ]
    jobs.sort(key=lambda job: (job[0] > 1, cells[job[1]].task != Task.T2I, job[0]))
    return [(groups[place], n) for place, n in jobs]


def row(cell: Cell, name: str, found: dict[str, Any], flops: float, real: bool) -> Row:
    if not found:
        return Row(f"{cell.name}: {name}", "does not fit into the memory", "cannot")
    seconds, memory = median(found["seconds"]), found["memory"]
    text = (
        f"{1000 * seconds:.0f} ms (least {1000 * min(found['seconds']):.0f}), {cell.samples / seconds:.3g} samples/s, "
        f"peak {memory['peak'] / 1024:.1f} GiB, first step {found['first']:.0f} s"
    )
    state: State = "told"
    if real:
        goal = GOAL if cell.task == Task.T2I else GOAL_EDIT
        peak = peak_of(torch.cuda.get_device_name(), found["rate"])
        mfu = flops / seconds / peak
        if name == "ours":
            state = met(mfu >= goal)
        target = f" (goal {goal:.0%})" if name == "ours" else ""
        text += f", MFU {mfu:.1%}{target} of {peak / 1e12:.0f} TFLOP/s; a large product {found['rate'] / 1e12:.0f}"
    if found.get("profile"):
        text += "; " + ", ".join(f"{kind} {share:.0%}" for kind, share in found["profile"].items())
    return Row(f"{cell.name}: {name}", text, state, seconds)


def planned(cell: Cell, text: int) -> dict[str, float]:
    """Variant -> bytes that `wemmu plan` has for a step of the cell on one GPU. text: tokens of the longest prompt."""
    curriculum = make_curriculum(cell, "single", PUBLISHED)
    (stage,) = plan(curriculum, Machine("h200", Degrees(1, 1, 1)), Assumptions(prompt_tokens=text)).stages
    return {"ours": stage.gpu_total, "ours, checkpointing": stage.gpu_total_checkpointed}


# A cell, what was measured of its variants, and its `planned`.
Planned = tuple[Cell, dict[str, dict[str, Any]], "Future[dict[str, float]]"]


def by_plans(waiting: list[Planned], seconds: float) -> Iterator[Row]:
    """Take those out of `waiting` whose plan is there in so many seconds, and yield their rows."""
    until = time.monotonic() + seconds
    for one in list(waiting):
        if wait([one[2]], max(0.0, until - time.monotonic())).done:
            waiting.remove(one)
            yield from tried(f"{one[0].name}: the plan", by_plan(*one))


def by_plan(cell: Cell, variants: dict[str, dict[str, Any]], plans: "Future[dict[str, float]]") -> Iterator[Row]:
    """The plan's memory beside the measured peak of each variant that both have."""
    for variant, bytes_ in plans.result().items():
        if variants.get(variant):
            here, there = variants[variant]["memory"]["peak"] / 1024, bytes_ / 2**30
            text = f"{there:.1f} GiB planned, {here:.1f} measured: {here / there:.2f} (goal {1 - NEAR} to {1 + NEAR})"
            yield Row(f"{cell.name}: {variant}: peak by plan", text, met(abs(here / there - 1) <= NEAR))


def ratios(cell: Cell, group: Sequence[str], seconds: dict[str, float | None], real: bool) -> Iterator[Row]:
    """At equal checkpointing, of the naive step; without, of other kernels and of other engines.

    real: the sizes and the device that the goal is for.
    """
    engines = [(named(variant, engine), variant) for engine in ENGINES for variant in ("ours", *PLAIN)]
    kernels = [(variant, "ours") for variant in PLAIN | CHANNELS_LAST | DETERMINISTIC]
    for name, against in (("naive", "ours, checkpointing"), *kernels, *engines):
        ours, theirs = (seconds.get(f"{cell.name}: {one}") for one in (against, name))
        if name in group and ours and theirs:
            ratio = theirs / ours
            judged = real and name == "naive"
            goal = f" (goal {FASTER})" if judged else ""
            state = met(ratio >= FASTER) if judged else "told"
            yield Row(f"{cell.name}: {name} / {against}", f"{ratio:.2f}{goal}", state)


def sampling(setting: Setting) -> Iterator[Row]:
    """An image of the largest resolution, text to image with guidance, by steps of the solver; random weights."""
    settings, cells = settings_of(setting)
    size, device, px = settings.load(), torch.device(setting.device), max(cell.px for cell in cells)
    model = make_model(size, device, getattr(torch, settings.dtype)).eval()
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(FIRST_WORD, 500, (size.text,), generator=generator).tolist()

    def prompts(texts: Sequence[str], grids: Sequence[Any]) -> Prompts:
        return prompts_of([words for _ in texts], [])

    encoder: Any = prompts

    sampler = Sampler(model, encoder, 3.0, device=device)
    request = GenerationRequest(Task.T2I, ["words"], torch.empty(1, 0, 3, px, px), (px, px), torch.tensor([0]))
    draw(sampler, request, 2)
    for steps_ in SOLVER_STEPS if setting.real else (2,):
        with watch(device) as memory:
            seconds = [draw(sampler, request, steps_) for _ in range(3)]
        peak = f"{memory.peak / 1024:.1f} GiB at the peak, {memory.before / 1024:.1f} of them weights"
        yield Row(f"an image of {px} px, {steps_} steps", f"{median(seconds):.3g} s, {peak}")


def draw(sampler: Sampler, request: GenerationRequest, steps_: int) -> float:
    begun = time.perf_counter()
    image: Tensor = sampler(request, Sampling(steps=steps_))
    assert bool(image.isfinite().all()), "the image has values that are not finite"
    return time.perf_counter() - begun
