"""A curriculum and a machine -> what each stage will take."""

import math
from dataclasses import dataclass

from wemmu.config.schema import Curriculum
from wemmu.config.stage import Rung
from wemmu.config.task import Task
from wemmu.planning import memory, schedule, traffic
from wemmu.planning.backbones import PlanError, Sizes, read_sizes
from wemmu.planning.flops import Assumptions, Cost, mean_flops, sample_flops, sample_of
from wemmu.planning.load import Degrees, Load
from wemmu.planning.moments import Moment, fullest, moments
from wemmu.planning.parameters import Part, count, divisors, valid_tensor_degrees
from wemmu.readable import human


@dataclass(frozen=True)
class GPU:
    """peak: dense bf16 FLOP/s of the data sheet. memory: bytes."""

    peak: float
    memory: float


# A100, H100, H200 as SXM modules, B200 in an HGX board.
GPUS = {
    "a100": GPU(312e12, 80e9),
    "h100": GPU(989e12, 80e9),
    "h200": GPU(989e12, 141e9),
    "b200": GPU(2250e12, 180e9),
}


@dataclass(frozen=True)
class Machine:
    """mfu: model FLOPs per second as a share of the peak of all GPUs."""

    gpu: str
    degrees: Degrees
    mfu: float

    @property
    def flops(self) -> float:
        """FLOP/s that do useful work, of all ranks."""
        return self.degrees.world * GPUS[self.gpu].peak * self.mfu


@dataclass(frozen=True)
class StagePlan:
    """One stage, or one rung of its ladder, if every rung takes as many steps as it may.

    Memory in bytes, FLOPs by task and part for one sample, `flops` of the average sample. traffic: bytes of a step by
    collective, see `wemmu.planning.traffic`. idle: the share of its time in the DiT that a rank waits for other stages
    of the pipeline. gpu_peak: what a GPU holds beside its states where, without checkpointing, that is most.
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
    gpu_peak: Moment
    gpu_total: float
    gpu_total_checkpointed: float
    host_memory: dict[str, float]
    host_total: float
    checkpoint: float
    traffic: dict[str, float]
    idle: float
    by_task: dict[Task, dict[Part, Cost]]
    flops: float
    samples_per_s: float
    hours: float
    gpu_hours: float


@dataclass(frozen=True)
class Plan:
    name: str
    machine: Machine
    assumptions: Assumptions
    parameters: dict[Part, int]
    stages: tuple[StagePlan, ...]
    # Whether the curriculum asks for activation checkpointing.
    checkpointing: bool = False
    # Backbones that are not on this machine; their sizes are those of the package.
    packaged: tuple[str, ...] = ()


def above_memory(plan: Plan) -> list[str]:
    """A sentence for each stage that needs more than a GPU has."""
    room, found = GPUS[plan.machine.gpu].memory, []
    for stage in plan.stages:
        kept, again = stage.gpu_total, stage.gpu_total_checkpointed
        if (again if plan.checkpointing else kept) <= room:
            continue
        told = f"{stage.name} needs {human(again if plan.checkpointing else kept, 'B')} of the {human(room, 'B')} "
        told += f"that GPUs of the kind {plan.machine.gpu} have"
        if not plan.checkpointing and again <= room:
            told += f"; with memory.checkpointing: true it is {human(again, 'B')}"
        elif not plan.checkpointing:
            told += f", with memory.checkpointing: true still {human(again, 'B')}"
        found.append(told)
    return found


def plan(curriculum: Curriculum, machine: Machine, assumptions: Assumptions) -> Plan:
    """Plan every stage, at each of its resolutions.

    Raises:
        PlanError: if a config.json is missing, the stages are not of generation, or a degree cannot be, with the valid
            ones.
    """
    if machine.gpu not in GPUS:
        raise PlanError(f"there is no GPU {machine.gpu!r}; valid choices: {', '.join(GPUS)}")
    if not 0 < machine.mfu <= 1:
        raise PlanError(f"the MFU is a share above 0 and at most 1, got {machine.mfu}")
    if not curriculum.recipe.draws:
        raise PlanError("the arithmetic is of a bridge and a DiT; a plan of reconstructive stages cannot be made yet")
    sizes = read_sizes(curriculum.backbones)
    check_degrees(curriculum, sizes, machine.degrees)
    parameters = count(sizes, curriculum.recipe.bridge)
    stages = tuple(
        plan_stage(curriculum, index, rung, sizes, parameters, machine, assumptions)
        for index, stage in enumerate(curriculum.stages)
        for rung in stage.rungs
    )
    checkpointing, packaged = curriculum.memory.checkpointing, tuple(map(str, sizes.packaged))
    return Plan(curriculum.name, machine, assumptions, parameters, stages, checkpointing, packaged)


def plan_stage(
    curriculum: Curriculum,
    index: int,
    stage: Rung,
    sizes: Sizes,
    parameters: dict[Part, int],
    machine: Machine,
    assumptions: Assumptions,
) -> StagePlan:
    degrees, (begin, end) = machine.degrees, stage.span
    shapes = {task: sample_of(task, stage.resolution, sizes, curriculum, assumptions) for task in stage.mixture}
    by_task = {task: sample_flops(sample, sizes, stage) for task, sample in shapes.items()}
    micro, accumulation = curriculum.memory.micro_batch_at(stage.resolution, stage.global_batch, degrees.world)
    load = Load(curriculum, stage, sizes, parameters, degrees, micro, accumulation, tuple(shapes.values()))
    held, host = memory.states(load), memory.host(load)
    kept, checkpointed = (moments(load, checkpointing) for checkpointing in (False, True))
    peak, checkpointed_peak, always = fullest(kept.values()), fullest(checkpointed.values()), sum(held.values())
    flops = mean_flops(by_task, stage.mixture)
    # The DiT's share of a sample is the same whatever the task.
    sample, costs = shapes[next(iter(shapes))], by_task[next(iter(by_task))]
    slots = schedule.stage_flops(sizes.dit, sample, stage, degrees.pp)
    idle = schedule.idle_share(slots, degrees.tp * degrees.pp)
    waited = costs["dit"].both * idle / (1 - idle)
    samples, rate = (end - begin) * stage.global_batch, machine.flops / (flops + waited)
    trained = sum(parameters[part] for part in stage.trains)
    return StagePlan(
        name=stage.label,
        resolution=stage.resolution,
        steps=end - begin,
        samples=samples,
        global_batch=stage.global_batch,
        micro_batch=micro,
        accumulation=accumulation,
        trains=stage.trains,
        trained=trained,
        frozen=sum(parameters.values()) - trained,
        gpu_memory=memory.gpu(held, kept, checkpointed),
        gpu_peak=peak,
        gpu_total=always + peak.total,
        gpu_total_checkpointed=always + checkpointed_peak.total,
        host_memory=host,
        host_total=memory.host_total(host),
        checkpoint=memory.checkpoint(parameters, stage, curriculum.stages[:index]),
        traffic=traffic.busiest(load),
        idle=idle,
        by_task=by_task,
        flops=flops,
        samples_per_s=rate,
        hours=samples / rate / 3600,
        gpu_hours=samples / rate / 3600 * degrees.world,
    )


def check_degrees(curriculum: Curriculum, sizes: Sizes, degrees: Degrees) -> None:
    """Raises PlanError for degrees that cannot be, naming those that can."""
    world, tp, pp = degrees.world, degrees.tp, degrees.pp
    dit = sizes.dit
    valid = valid_tensor_degrees(dit)
    if tp not in valid:
        raise PlanError(
            f"tensor parallelism over {tp} ranks cannot be: they must divide the {dit.hidden} channels of the DiT's "
            f"feed-forward and not outnumber its heads; valid: {', '.join(map(str, valid))}"
        )
    if not 1 <= pp <= dit.num_layers:
        raise PlanError(f"the DiT has {dit.num_layers} blocks, so pp can be 1 to {dit.num_layers}, got {pp}")
    if world < 1 or world % (tp * pp):
        below = world - world % (tp * pp)
        near = [n for n in (below, below + tp * pp) if n > 0]
        raise PlanError(
            f"a world of {world} ranks is not a multiple of tp x pp = {tp * pp}; valid nearby: "
            f"{' or '.join(map(str, near))}"
        )
    for stage in curriculum.stages:
        for rung in stage.rungs:
            _check_batch(curriculum, rung, degrees)


def _check_batch(curriculum: Curriculum, stage: Rung, degrees: Degrees) -> None:
    try:
        curriculum.memory.micro_batch_at(stage.resolution, stage.global_batch, degrees.world)
    except ValueError as error:
        model = degrees.tp * degrees.pp
        common = math.gcd(*(one.global_batch for one in curriculum.stages))
        worlds = [str(n) for n in divisors(common) if n % model == 0 and n <= 2 * degrees.world]
        raise PlanError(
            f"stage {stage.name}: {error}; valid worlds for all stages with tp x pp = {model}: "
            f"{', '.join(worlds) or 'none'}"
        ) from error
