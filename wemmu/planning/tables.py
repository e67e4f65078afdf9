"""Prints a plan: three tables and their assumptions."""

from collections.abc import Iterator

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from wemmu.config.task import Task
from wemmu.planning.plan import GPUS, Plan, above_memory, starving
from wemmu.readable import human


def render(plan: Plan) -> Group:
    return Group(_parameters(plan), _stages(plan), _flops(plan), _assumed(plan), *_to_know(plan))


def _to_know(plan: Plan) -> Iterator[Text]:
    if plan.known:
        yield Text(f"Not on disk, so planned with the published config.json of that name: {', '.join(plan.known)}")
    for sentence in above_memory(plan):
        yield Text(f"(!) {sentence}", "bold red")
    for sentence in starving(plan):
        yield Text(f"(!) {sentence}", "bold red")


def _table(title: str, *headings: str, names: int = 1) -> Table:
    """An empty table; its first `names` columns hold words, the others numbers."""
    table = Table(title=f"\n{title}", title_justify="left", box=box.HORIZONTALS, padding=(0, 1, 0, 0))
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i >= names else "left", no_wrap=i < names)
    return table


def _parameters(plan: Plan) -> Table:
    table = _table(f"Parameters of {plan.name}", "part", "number", "trained in")
    for part, number in plan.parameters.items():
        stages = ", ".join(stage.name for stage in plan.stages if part in stage.trains)
        table.add_row(part, human(number), stages if number else "")
    return table


def _stages(plan: Plan) -> Table:
    machine, degrees = plan.machine, plan.machine.degrees
    split = f", tp {degrees.tp}, pp {degrees.pp}" if degrees.tp * degrees.pp > 1 else ""
    title = f"Stages on {degrees.world} x {machine.gpu}{split}, at {machine.mfu:.0%} MFU"
    table = _table(title, "", *(stage.name for stage in plan.stages))
    for group in (_work(plan), _gpu(plan), _host(plan), _traffic(plan), _time(plan)):
        for row in group:
            table.add_row(*row)
        table.add_section()
    return table


def _work(plan: Plan) -> Iterator[list[str]]:
    stages, ranks = plan.stages, plan.machine.degrees.world
    yield ["resolution", *(f"{s.resolution} px" for s in stages)]
    yield ["steps", *(f"{s.steps:,}" for s in stages)]
    yield ["samples", *(human(s.samples) for s in stages)]
    yield ["micro x accumulated x ranks", *(f"{s.micro_batch} x {s.accumulation} x {ranks}" for s in stages)]
    yield ["parameters trained", *(human(s.trained) for s in stages)]
    yield ["parameters frozen", *(human(s.frozen) for s in stages)]


def _gpu(plan: Plan) -> Iterator[list[str]]:
    stages, room = plan.stages, GPUS[plan.machine.gpu].memory

    def fits(total: float, configured: bool) -> str:
        return human(total, "B") + (" (!)" if configured and total > room else "")

    yield [f"[b]GPU of a rank, {human(room, 'B')}"]
    for name in stages[0].gpu_memory:
        yield [name, *(human(s.gpu_memory[name], "B") for s in stages)]
    yield ["GPU peak", *(fits(s.gpu_total, not plan.checkpointing) for s in stages)]
    yield ["GPU peak, checkpointing", *(fits(s.gpu_total_checkpointed, plan.checkpointing) for s in stages)]


def _host(plan: Plan) -> Iterator[list[str]]:
    stages = plan.stages
    yield ["[b]host memory of a rank"]
    for name in stages[0].host_memory:
        yield [name, *(human(s.host_memory[name], "B") for s in stages)]
    yield ["host peak", *(human(s.host_total, "B") for s in stages)]


def _traffic(plan: Plan) -> Iterator[list[str]]:
    stages = plan.stages
    kinds = dict.fromkeys(kind for s in stages for kind in s.traffic)
    if kinds:
        yield ["[b]exchanged by a rank in a step"]
    for kind in kinds:
        yield [kind, *(human(s.traffic.get(kind, 0.0), "B") for s in stages)]
    if plan.machine.degrees.pp > 1:
        yield ["idle in the pipeline", *(f"{s.idle:.1%}" for s in stages)]


def _time(plan: Plan) -> Iterator[list[str]]:
    stages = plan.stages
    yield ["checkpoint on disk", *(human(s.checkpoint, "B") for s in stages)]
    yield ["FLOP for a sample", *(human(s.flops) for s in stages)]
    yield ["samples/s", *(human(s.samples_per_s) for s in stages)]
    yield ["loader threads per rank", *(str(s.loader_threads) for s in stages)]
    yield ["hours", *(_hours(s.hours) for s in stages)]
    yield ["GPU-hours", *(_hours(s.gpu_hours) for s in stages)]


def _hours(hours: float) -> str:
    if hours < 0.01:
        return "< 0.01"
    return f"{hours:.3g}" if hours < 100 else f"{hours:,.0f}"


def _flops(plan: Plan) -> Table:
    """One line for each task of each stage; tasks that cost what they did in the stage before are not repeated.

    Parts that never make a hundredth of the sum share the column `other`.
    """
    sums = [(parts, _sum(parts)) for stage in plan.stages for parts in stage.by_task.values()]
    columns = [part for part in plan.parameters if any(sum(p.get(part, (0,))) > s / 100 for p, s in sums)]
    table = _table(
        "FLOP for one sample, forward and backward, by part", "stage", "task", *columns, "other", "sum", names=2
    )
    printed: list[list[str]] = []
    for stage in plan.stages:
        for task, parts in stage.by_task.items():
            values = [sum(parts.get(part, (0.0,))) for part in columns]
            row = [str(task), *map(human, (*values, _sum(parts) - sum(values), _sum(parts)))]
            if row not in printed:
                table.add_row(stage.name, *row)
                printed.append(row)
    return table


def _sum(parts: dict[str, tuple[float, float]]) -> float:
    return sum(map(sum, parts.values()))


def _assumed(plan: Plan) -> str:
    a = plan.assumptions
    understanding = f", {a.answer_tokens} of them an answer's where words are learnt" * (
        Task.UNDERSTANDING in plan.stages[0].by_task
    )
    return (
        f"\nAssumed: {a.prompt_tokens} tokens to a prompt with words{understanding}, {a.empty_prompt_tokens} to one "
        f"without, {a.multi_edit_images} input images to a multi-image edit, square images. Rates are of model FLOPs "
        "at the stated MFU, and of the pipeline's idle time beside it: what checkpointing computes again and slow data "
        "lower the MFU. A loader thread delivers 163 images of 1024 px per second, measured on one busy core; "
        "`python -m benchmarks.data feed` measures a core of yours."
    )
