"""A curriculum and a machine -> the cost of each stage."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from wemmu.command_line import UsageError
from wemmu.config.schema import Curriculum, StageRun
from wemmu.config.task import Task
from wemmu.planning import layout, schedule
from wemmu.planning.ask import Answer, Item, PlanError, Shape, ask, configs_of
from wemmu.planning.layout import Degrees, MemoryPeak, RankWorkload
from wemmu.readable import human, valid

# Measured micro-batches; larger ones are extrapolated, because all values grow linearly with the samples.
MEASURED = (1, 2)


@dataclass(frozen=True)
class GPU:
    """peak: dense bf16 FLOP/s of the data sheet. memory: bytes."""

    peak: float
    memory: float


# A100, H100, H200 as SXM modules, B200 in an HGX board; RTX 4090 and L4 are cards.
GPUS = {
    "a100": GPU(312e12, 80e9),
    "h100": GPU(989e12, 80e9),
    "h200": GPU(989e12, 141e9),
    "b200": GPU(2250e12, 180e9),
    "rtx4090": GPU(165e12, 24e9),
    "l4": GPU(121e12, 24e9),
}


# Seconds of a core to read, check, decode, tokenize and collate an image: for a record, by `python -m benchmarks.data
# growth`, and for a pixel, by `python -m benchmarks.data feed`, which has 163 images of 1024 px in a second.
LOADING_S, LOADING_S_PER_PX = 133e-6, (1 / 163 - 133e-6) / 1024**2


@dataclass(frozen=True)
class Machine:
    """mfu: model FLOPs per second as a share of the peak of all GPUs."""

    gpu: str
    degrees: Degrees
    mfu: float = 0.35

    @classmethod
    def of(cls, curriculum: Curriculum, gpu: str = "h100") -> "Machine":
        """Return GPUs of this kind in the layout that the curriculum names."""
        said = curriculum.parallel
        return cls(gpu, Degrees(said.ranks, said.tp, said.pp))

    @property
    def flops(self) -> float:
        """FLOP/s that do useful work, of all ranks."""
        return self.degrees.world * GPUS[self.gpu].peak * self.mfu


@dataclass(frozen=True)
class Assumptions:
    """The sizes of a sample that the curriculum does not contain; images are squares.

    prompt_tokens: of a prompt with words, chat format included, images not. empty_prompt_tokens: of the chat format
    alone, for tasks without words. multi_edit_images: input images of a multi-image edit. answer_tokens: of a question
    with its answer, those of the answer.
    """

    prompt_tokens: int = 128
    empty_prompt_tokens: int = 20
    multi_edit_images: int = 2
    answer_tokens: int = 64


@dataclass(frozen=True)
class StagePlan:
    """One stage, or one resolution of it with its largest number of steps.

    Memory in bytes. by_task: FLOPs of one sample by task and part, forward and backward; `flops` of the average sample.
    traffic: bytes of a step by collective, see `layout.traffic`. idle: the share of its time in the DiT that a rank
    waits for other stages of the pipeline. gpu_peak: what a GPU holds beside its states where, without checkpointing,
    that is most. loader_threads: how many a rank needs if every sample has as many images as the task with most.
    """

    name: str
    resolution: int
    steps: int
    samples: int
    global_batch: int
    micro_batch: int
    accumulation: int
    trains: tuple[str, ...]
    trained: int
    frozen: int
    gpu_memory: dict[str, float]
    gpu_peak: MemoryPeak
    gpu_total: float
    gpu_total_checkpointed: float
    host_memory: dict[str, float]
    host_total: float
    checkpoint: float
    traffic: dict[str, float]
    idle: float
    by_task: dict[Task, dict[str, tuple[float, float]]]
    flops: float
    samples_per_s: float
    hours: float
    gpu_hours: float
    loader_threads: int


@dataclass(frozen=True)
class Plan:
    """checkpointing: whether the curriculum asks for it. known: absent backbones, planned by their published names.
    workers: the loader threads of a rank."""

    name: str
    machine: Machine
    assumptions: Assumptions
    parameters: dict[str, int]
    stages: tuple[StagePlan, ...]
    checkpointing: bool
    known: tuple[str, ...]
    workers: int

    @property
    def peaks(self) -> dict[str, float]:
        """Stage -> bytes on the fullest GPU, with checkpointing as the curriculum has it."""
        return {s.name: s.gpu_total_checkpointed if self.checkpointing else s.gpu_total for s in self.stages}


def above_memory(plan: Plan) -> list[str]:
    """Return a sentence for each stage that needs more memory than a GPU has."""
    room, found = GPUS[plan.machine.gpu].memory, []
    for stage in plan.stages:
        peak, again = plan.peaks[stage.name], stage.gpu_total_checkpointed
        if peak <= room:
            continue
        warning = f"{stage.name} needs {human(peak, 'B')} of the {human(room, 'B')} that GPUs of the kind "
        warning += f"{plan.machine.gpu} have"
        if not plan.checkpointing and again <= room:
            warning += f"; with memory.checkpointing: true it is {human(again, 'B')}"
        elif not plan.checkpointing:
            warning += f", with memory.checkpointing: true still {human(again, 'B')}"
        found.append(warning)
    return found


def starving(plan: Plan) -> list[str]:
    """Return a sentence for each stage whose GPUs would wait for the loader."""
    return [
        f"{stage.name} needs {stage.loader_threads} loader threads per rank, and has {plan.workers}; set "
        f"data.workers={stage.loader_threads}"
        for stage in plan.stages
        if stage.loader_threads > max(1, plan.workers)
    ]


def loader_threads(samples_per_s: float, images: int, px: int) -> int:
    """Return the threads, a core each, that load samples of so many square images as fast as a rank takes them."""
    return max(1, math.ceil(samples_per_s * images * (LOADING_S + LOADING_S_PER_PX * px**2)))


def shape_of(task: Task, run: StageRun, assumed: Assumptions) -> Shape:
    """Return the shape of a sample of `task` in the stage of `run`."""
    wordless = task in (Task.RECONSTRUCTION, Task.UNCONDITIONAL)
    images = {Task.T2I: 0, Task.UNCONDITIONAL: 0, Task.MULTI_EDIT: assumed.multi_edit_images}.get(task, 1)
    return Shape(
        task,
        run.stage.resolution,
        run.stage.resolution,
        text=assumed.empty_prompt_tokens if wordless else assumed.prompt_tokens,
        images=images,
        answer=min(assumed.answer_tokens, assumed.prompt_tokens - 1) * (task in (Task.UNDERSTANDING, Task.CAPTION)),
        stored=run.data.prepare is not None and run.data.prepare.latents is not None,
    )


def check_split(curriculum: Curriculum, degrees: Degrees) -> None:
    """Raise PlanError if the DiT cannot be split so; lists the valid degrees."""
    run = curriculum.stage_run(curriculum.stages[0].name)
    if degrees.split:
        shape = shape_of(next(iter(run.stage.mixture)), run, Assumptions())
        ask([Item("slices", run, shape, degrees.tp, degrees.pp)])


def parameters_of(curriculum: Curriculum) -> Answer:
    """Return the parameters of the curriculum's model, and the sizes that follow from its backbones."""
    return ask([Item("parameters", curriculum.stage_run(curriculum.stages[0].name))])[0]


def plan(curriculum: Curriculum, machine: Machine, assumptions: Assumptions) -> Plan:
    """Plan every stage, at each of its resolutions.

    Raises:
        PlanError: if a config.json is missing, the model cannot be built or stepped, or a degree cannot be, with the
            valid ones.
    """
    if machine.gpu not in GPUS:
        raise UsageError(f"--gpu {machine.gpu} is unknown; {valid(machine.gpu, GPUS, 'valid choices')}")
    if not 0 < machine.mfu <= 1:
        raise UsageError(f"--mfu {machine.mfu} is not a share above 0 and at most 1, as 0.35")
    runs = [run for stage in curriculum.stages for run in curriculum.resolution_runs(stage.name)]
    _, absent = configs_of(runs[0])
    check_degrees(curriculum, machine.degrees)
    model = parameters_of(curriculum)
    measures = [_Measures(run, machine.degrees, assumptions) for run in runs]
    # All of them at once, so that one process measures what is not known yet.
    ask([item for one in measures for item in one.items])
    stages = tuple(_plan_stage(curriculum, one, model, machine) for one in measures)
    known = tuple(map(str, absent))
    checkpointing, workers = curriculum.memory.checkpointing, curriculum.data.workers
    return Plan(curriculum.name, machine, assumptions, model["parts"], stages, checkpointing, known, workers)


class _Measures:
    """The measurements of one stage."""

    def __init__(self, run: StageRun, degrees: Degrees, assumed: Assumptions):
        self.run, self.degrees = run, degrees
        stage, memory = run.stage, run.memory
        self.micro, self.accumulation = memory.micro_batch_at(stage.resolution, stage.global_batch, degrees.world)
        self.shapes = {task: shape_of(task, run, assumed) for task in stage.mixture}
        # The samples that take most memory.
        self.largest = max(self.shapes.values(), key=lambda shape: (shape.images, shape.text))
        self.sizes = MEASURED if self.micro > max(MEASURED) else (self.micro,)
        # Prompts of several samples differ in length.
        self.padded = self.micro > 1

    def _with(self, checkpointing: bool) -> StageRun:
        return self.run.changed({"memory.checkpointing": checkpointing})

    def _step(self, shape: Shape, checkpointing: bool) -> list[Item]:
        run = self._with(checkpointing)
        return [Item("step", run, replace(shape, samples=n, padded=self.padded)) for n in self.sizes]

    def _slices(self, checkpointing: bool) -> list[Item]:
        shape = replace(self.largest, samples=self.micro)
        return [Item("slices", self._with(checkpointing), shape, self.degrees.tp, self.degrees.pp)]

    @property
    def items(self) -> list[Item]:
        # The first says whether the degrees can be.
        found = [*self._slices(False), *self._slices(True)] if self.degrees.split else []
        found += [item for shape in self.shapes.values() for item in self._step(shape, False)]
        return found + self._step(self.largest, True)

    def step(self, shape: Shape, checkpointing: bool = False) -> Answer:
        """Measure the whole micro-batch."""
        answers = ask(self._step(shape, checkpointing))
        return answers[0] if len(answers) == 1 else dict(extrapolated(answers[0], answers[1], at=self.micro))

    def slices(self, checkpointing: bool = False) -> Answer | None:
        return ask(self._slices(checkpointing))[0] if self.degrees.split else None


def extrapolated(one: Any, two: Any, at: int) -> Any:
    """Extrapolate to a micro-batch of `at` samples from the values of 1 and 2 samples."""
    if isinstance(two, Mapping):
        return {key: extrapolated(one.get(key, 0), value, at) for key, value in two.items()}
    if isinstance(two, list):
        return [extrapolated(a, b, at) for a, b in zip(one, two, strict=True)]
    return one + (two - one) * (at - 1)


def _plan_stage(curriculum: Curriculum, measured: _Measures, model: Answer, machine: Machine) -> StagePlan:
    run, degrees, stage = measured.run, machine.degrees, measured.run.stage
    rank = RankWorkload(run, model, degrees, measured.micro, measured.accumulation, measured.slices())
    held = layout.states(rank)
    kept, again = (layout.moments(rank, measured.step(measured.largest, c), measured.slices(c)) for c in (False, True))
    peak, always = layout.fullest(kept.values()), sum(held.values())
    by_task = {
        task: {
            part: (forward / measured.micro, backward / measured.micro) for part, (forward, backward) in flops.items()
        }
        for task, flops in ((task, measured.step(shape)["flops"]) for task, shape in measured.shapes.items())
    }
    # A step draws its whole batch from one task, by the weights of the mixture.
    weight = sum(stage.mixture.values())
    flops = sum(stage.mixture[task] / weight * sum(map(sum, parts.values())) for task, parts in by_task.items())
    idle = waited = 0.0
    if rank.slices is not None:
        places, rounds = rank.slices["places"], degrees.tp * degrees.pp
        slots = [list(schedule.order(i, degrees.pp, rounds, place["flops"])) for i, place in enumerate(places)]
        idle = schedule.idle_share(slots)
        # The DiT's share of a sample is the same whatever the task.
        waited = sum(next(iter(by_task.values()))["dit"]) * idle / (1 - idle)
    begin, end = stage.span
    samples, rate = (end - begin) * stage.global_batch, machine.flops / (flops + waited)
    trained = sum({**model["parts"], **model["adapters"]}[part] for part in stage.trains)
    host = layout.host(rank, 1 + measured.largest.images)
    earlier = {part for one in curriculum.stages[: run.stage_index] for part in one.trains}
    return StagePlan(
        name=stage.label,
        resolution=stage.resolution,
        steps=end - begin,
        samples=samples,
        global_batch=stage.global_batch,
        micro_batch=measured.micro,
        accumulation=measured.accumulation,
        trains=stage.trains,
        trained=trained,
        frozen=sum(model["parts"].values()) - trained,
        gpu_memory={
            **held,
            "gathered": kept["end of forward"].gathered,
            "activations": kept["end of forward"].activations,
            "checkpointed activations": again["end of forward"].activations,
            **{name: moment.total for name, moment in kept.items() if name != "end of forward"},
        },
        gpu_peak=peak,
        gpu_total=always + peak.total,
        gpu_total_checkpointed=always + layout.fullest(again.values()).total,
        host_memory=host,
        host_total=layout.host_total(host),
        checkpoint=layout.checkpoint(model, run, earlier),
        traffic=layout.traffic(rank),
        idle=idle,
        by_task=by_task,
        flops=flops,
        samples_per_s=rate,
        hours=samples / rate / 3600,
        gpu_hours=samples / rate / 3600 * degrees.world,
        loader_threads=loader_threads(rate / degrees.world, 1 + measured.largest.images, stage.resolution),
    )


def check_degrees(curriculum: Curriculum, degrees: Degrees) -> None:
    """Raise PlanError for an invalid world size; lists valid ones. `plan` checks whether the DiT can be split."""
    world, tp, pp = degrees.world, degrees.tp, degrees.pp
    if degrees.split:
        try:
            curriculum.recipe.check(curriculum.stages, "hybrid")
            curriculum.recipe.check_memory(curriculum.memory, curriculum.stages, "hybrid")
        except ValueError as error:
            raise PlanError(f"tp = {tp} and pp = {pp} need engine hybrid: {error}") from error
    if world < 1 or world % (tp * pp):
        below = world - world % (tp * pp)
        near = [n for n in (below, below + tp * pp) if n > 0]
        raise PlanError(
            f"a world of {world} ranks is not a multiple of tp x pp = {tp * pp}; valid nearby: "
            f"{' or '.join(map(str, near))}"
        )
    for stage in curriculum.stages:
        if stage.global_batch % world:
            common = math.gcd(*(one.global_batch for one in curriculum.stages))
            worlds = [str(n) for n in range(tp * pp, min(common, 2 * world) + 1, tp * pp) if common % n == 0]
            raise PlanError(
                f"stage {stage.name}: the global batch {stage.global_batch} is not a multiple of the {world} ranks; "
                f"valid worlds for all stages with tp x pp = {tp * pp}: {', '.join(worlds) or 'none'}"
            )
