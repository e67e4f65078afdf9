"""Large worlds without the hardware: this machine plays ranks of them, and the plan is held against what they did.

`python -m benchmarks.at_scale configs/curriculum/paper.yaml --ranks 8 --ranks 64 --tp 2 --pp 2` takes, for each world
and each stage of the DiT's pipeline, the place of the first rank that holds it, and steps through the project's own
code at the published sizes (`wemmu.measuring.fake_world`): fullest rank's memory, bytes by collective, the pipeline's
idle share, beside those of `wemmu.plan`. The backbones are the published ones, whatever the curriculum names, and
each global batch is the nearest multiple of the ranks. A rank takes minutes, in a process of its own; `--measured FILE`
holds the plan against an earlier measurement at once.
"""

import json
import multiprocessing
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from tests.planning.worlds import curriculum_with, write_published
from wemmu.config.schema import Backbones, Curriculum, Parallel
from wemmu.planning.ask import Shape
from wemmu.planning.layout import Degrees
from wemmu.planning.plan import Assumptions, Machine, StagePlan, plan, shape_of
from wemmu.planning.schedule import Slot, idle_share
from wemmu.readable import human

PAPER = Path("configs/curriculum/paper.yaml")
# Plan's name of what a GPU always holds -> what `benchmarks.stepping` counts it as.
PURPOSES = {
    "frozen weights": "weights",
    "working weights": "weights",
    "master weights": "weights",
    "moments": "moments",
    "moving average": "moments",
    "gradients": "gradients",
}


@dataclass(frozen=True)
class Case:
    """One rank to play: the first one of model group 0 that holds stage `place` of the DiT's pipeline."""

    curriculum: Path
    world: int
    tp: int
    pp: int
    stage: str
    place: int

    @property
    def name(self) -> str:
        split = f", tp {self.tp} x pp {self.pp}" if self.tp * self.pp > 1 else ""
        return f"{self.stage}, {self.world} ranks{split}"


def adapted(file: Path, world: int, backbones: Backbones) -> Curriculum:
    """The curriculum with each global batch at the nearest multiple of `world`, on these backbones, not compiled."""
    asked = curriculum_with(file, backbones)
    changes = [f"stages.{s.name}.global_batch={max(1, round(s.global_batch / world)) * world}" for s in asked.stages]
    return curriculum_with(file, backbones, "kernels.compile=false", *changes)


def fullest_sample(curriculum: Curriculum, stage: str) -> Shape:
    """The samples of a stage that take most memory."""
    run = curriculum.stage_run(stage)
    shapes = [shape_of(task, run, Assumptions()) for task in run.stage.mixture]
    return max(shapes, key=lambda shape: (shape.images, shape.text))


def play(case: Case, backbones: Backbones) -> dict[str, Any]:
    """What the rank of `case` measures, as JSON."""
    from benchmarks.stepping import measure

    curriculum = adapted(case.curriculum, case.world, backbones)
    shape = fullest_sample(curriculum, case.stage)
    parallel = Parallel(engine="hybrid" if case.tp * case.pp > 1 else "zero3", ranks=case.world, tp=case.tp, pp=case.pp)
    run = curriculum.stage_run(case.stage).model_copy(update={"parallel": parallel})
    found = measure(run, shape, case.place * case.tp)
    traffic = {
        f"{c.kind} over {c.size}": {"calls": found.traffic.calls[c], "bytes": number}
        for c, number in found.traffic.bytes.items()
    }
    return {
        **asdict(case), "curriculum": str(case.curriculum), "global_batch": run.stage.global_batch, "task": shape.task,
        "peak": found.peak, "memory": found.memory, "traffic": traffic, "slots": [s._asdict() for s in found.slots],
    }  # fmt: skip


def planned(case: Case, backbones: Backbones) -> StagePlan:
    machine = Machine("h100", Degrees(case.world, case.tp, case.pp))
    curriculum = adapted(case.curriculum, case.world, backbones)
    alone = tuple(stage for stage in curriculum.stages if stage.name == case.stage)
    return plan(curriculum.model_copy(update={"stages": alone}), machine, Assumptions()).stages[0]


def run_all(cases: list[Case], backbones: Backbones, jobs: int, out: Path | None) -> list[dict[str, Any]]:
    """Each case in a process of its own; `out` has what is finished, whatever comes."""
    found: list[dict[str, Any]] = []
    # The libraries take most of a minute to import: once, here, and not in every process.
    import benchmarks.stepping  # noqa: F401

    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        for rank in pool.imap_unordered(partial(play, backbones=backbones), cases):
            found.append(rank)
            if out is not None:
                out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


@dataclass(frozen=True)
class Row:
    """A number that was measured and planned. unit: B, or % of time."""

    name: str
    measured: float
    planned: float
    unit: str = "B"

    @property
    def error(self) -> float:
        """Of the plan, as a share of what was measured; of shares of time their difference."""
        if self.unit == "%":
            return self.planned - self.measured
        return self.planned / self.measured - 1 if self.measured else float(self.planned > 0)


# Bytes of a step below which a collective is no traffic: the norm, the losses.
SMALL = 1e6


def compare(ranks: list[dict[str, Any]], plan: StagePlan) -> list[Row]:
    """`ranks`: what was measured on each stage of the DiT's pipeline, of one world and stage of the curriculum."""
    fullest = max(ranks, key=lambda rank: rank["peak"])
    memory = dict.fromkeys(fullest["memory"], 0.0)
    for part, purpose in PURPOSES.items():
        memory[purpose] += plan.gpu_memory[part]
    for purpose, number in asdict(plan.gpu_peak).items():
        memory[purpose] += number
    rows = [Row("memory, peak", fullest["peak"], plan.gpu_total)]
    rows += [Row(f"- {purpose}", fullest["memory"][purpose], number) for purpose, number in memory.items()]
    busiest = max(ranks, key=lambda rank: sum(one["bytes"] for one in rank["traffic"].values()))["traffic"]
    sent = {name: one["bytes"] for name, one in busiest.items() if one["bytes"] >= SMALL}
    names = dict.fromkeys([*sent, *plan.traffic])
    rows += [Row(name, sent.get(name, 0), plan.traffic.get(name, 0.0)) for name in names]
    if len(ranks) > 1:
        slots = [[Slot(**slot) for slot in rank["slots"]] for rank in sorted(ranks, key=lambda rank: rank["place"])]
        rows.append(Row("idle in the pipeline", idle_share(slots), plan.idle, "%"))
    return rows


def report(found: list[dict[str, Any]], backbones: Backbones) -> str:
    """A table in Markdown for every world and stage of which all ranks were played."""
    groups: dict[Case, list[dict[str, Any]]] = {}
    for rank in found:
        case = Case(Path(rank["curriculum"]), rank["world"], rank["tp"], rank["pp"], rank["stage"], 0)
        groups.setdefault(case, []).append(rank)
    lines: list[str] = []
    for case, ranks in sorted(groups.items(), key=lambda item: item[0].name):
        if len(ranks) < case.pp:
            continue
        plan = planned(case, backbones)
        batch = f"{plan.micro_batch} x {plan.accumulation} x {case.world} samples, {ranks[0]['task']}"
        lines += ["", f"### {case.name}", "", batch, "", "| | measured | planned | error |", "|---|---:|---:|---:|"]
        for row in compare(ranks, plan):
            values = [human(v, "B") if row.unit == "B" else f"{v:.1%}" for v in (row.measured, row.planned)]
            lines.append(f"| {row.name} | {values[0]} | {values[1]} | {row.error:+.1%} |")
    return "\n".join(lines[1:])


def main(
    curriculum: Annotated[Path, typer.Argument(help="Curriculum in YAML.")] = PAPER,
    ranks: Annotated[list[int], typer.Option(help="Ranks in all. Repeatable.")] = [8, 64, 1024],  # noqa: B006
    tp: Annotated[int, typer.Option(help="Tensor parallel degree of the DiT; 1 x 1 is ZeRO-3, else hybrid.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline parallel degree of the DiT.")] = 1,
    stage: Annotated[list[str], typer.Option(help="Of the curriculum. Repeatable.")] = ["stage1", "stage2"],  # noqa: B006
    jobs: Annotated[int, typer.Option(help="Ranks to play at a time.")] = 1,
    out: Annotated[Path | None, typer.Option(help="JSON file for what was measured.")] = None,
    measured: Annotated[Path | None, typer.Option(help="Do not measure: take it from this file.")] = None,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        backbones = write_published(Path(folder))
        if measured is not None:
            found = json.loads(measured.read_text(encoding="utf-8"))
        else:
            cases = [Case(curriculum, w, tp, pp, name, place) for name in stage for w in ranks for place in range(pp)]
            found = run_all(cases, backbones, jobs, out)
        print(report(found, backbones))


if __name__ == "__main__":
    typer.run(main)
