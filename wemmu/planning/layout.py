"""The memory and traffic of one rank: the model's measurements, divided by the rules of the layout.

The VLM and the VAE of a generation stage are whole on every rank. `zero3` shards all that can be trained over all ranks
(ZeRO-3, arXiv 1910.02054), and the ranks of `hybrid` share a DiT by slices and stages, each sharded over its copies,
beside a bridge that is sharded over all ranks. The fullest rank is meant: of a pipeline one of the first stage, which
has several micro-batches of the DiT under way.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from wemmu.config.schema import StageRun
from wemmu.planning.schedule import order

FP32 = 4
# Elements, as `wemmu.parallel.zero3` has them: ZeRO-3 keeps so many gathered, and reduces gradients in such buckets.
LIVE = 1_000_000_000
BUCKET = 50_000_000
# AdamW keeps two numbers in fp32 for each that it trains.
MOMENTS = 2 * FP32
# Bytes of a number in 8 or 4 bit, with its share of a float32 scale (`wemmu.backbones.quantized.BLOCK`).
PACKED = {"int8": 1 + FP32 / 256, "nf4": 1 / 2 + FP32 / 64}
# Resident after the imports of `wemmu.train`, 0.9 GB on a CPU; CUDA's own libraries come on top.
LIBRARIES = 2e9

Answer = Mapping[str, Any]


@dataclass(frozen=True)
class Degrees:
    """Number of ranks, each with its own samples; tensor and pipeline parallel degree of the DiT; copies of the DiT."""

    world: int
    tp: int
    pp: int

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.pp)

    @property
    def split(self) -> bool:
        """Whether the DiT is split; only the hybrid engine does this."""
        return self.tp * self.pp > 1


@dataclass(frozen=True)
class MemoryPeak:
    """Temporary memory at one point of a step, in bytes, in addition to what a rank always holds.

    gathered: whole weights, and buffers of all-gathers. gradients: whole gradients, and buffers of reduce-scatters.
    activations: tensors kept for the backward pass, or alive during a computation.
    """

    gathered: float = 0.0
    gradients: float = 0.0
    activations: float = 0.0

    @property
    def total(self) -> float:
        return self.gathered + self.gradients + self.activations


@dataclass(frozen=True)
class RankWorkload:
    """A stage on so many ranks. model: the answer `parameters`; slices: of a split DiT, from the first stage on.

    micro: samples that a rank has at once, `accumulation` times a step.
    """

    run: StageRun
    model: Answer
    degrees: Degrees
    micro: int
    accumulation: int
    slices: Answer | None = None

    @property
    def width(self) -> int:
        """Bytes of a number in frozen and in working weights."""
        return {"float32": 4, "bfloat16": 2}[self.run.backbones.dtype]

    def home(self, part: str) -> str:
        return str(self.model["homes"].get(part, part))

    def is_sharded(self, part: str) -> bool:
        return self.home(part) in self.model["sharded"]

    @cached_property
    def share(self) -> dict[str, float]:
        """Numbers that a rank has of each part, as if its shard were whole: with padding; of a split DiT its slice."""
        share: dict[str, float] = dict(self.model["parts"])
        if self.slices is not None:
            share["dit"] = numbers(self.slices["places"][0], self.degrees.dp)
            bridge = self.model["bridge"]
            padding = numbers(bridge, self.degrees.world) / numbers(bridge, 1)
            share |= {part: n * padding for part, n in share.items() if self.home(part) == "bridge"}
        return share

    def shards(self, part: str) -> int:
        """Return the number of ranks over which a rank's share of a part is sharded."""
        if not self.is_sharded(part):
            return 1
        return self.degrees.dp if self.degrees.split and part == "dit" else self.degrees.world

    @property
    def trained(self) -> float:
        """Numbers that this rank trains."""
        return sum(self.learns(part) / self.shards(part) for part in self.run.stage.trains)

    def learns(self, part: str) -> float:
        """Return the numbers of `share` that the stage trains: of a part with adapters, these alone."""
        if part not in self.run.stage.trains:
            return 0
        return float(self.model["adapters"].get(part, self.share[part]))

    @cached_property
    def frozen(self) -> dict[str, float]:
        """Bytes that a rank has of each part that do not learn."""
        # FSDP2's shards are float32, those of a frozen DiT, too.
        wide = {part for part in self.share if self.degrees.split and self.is_sharded(part)} | {*self.model["float32"]}
        each = {part: (FP32 if part in wide else self.width) / self.shards(part) for part in self.share}
        found = {part: (n - self.learns(part)) * each[part] for part, n in self.share.items()}
        for packed, kind in self.run.memory.quantize.items():
            for part, n in self.model["quantizable"][packed]["numbers"].items():
                found[part] -= n * (each[part] - PACKED[kind])
        return found

    def comes(self, part: str) -> float:
        """Return the bytes that a part in host memory (`memory.offload`) copies to the GPU for each use."""
        home = self.home(part)
        if home not in self.run.memory.offload:
            return 0.0
        return sum((n for p, n in self.frozen.items() if self.home(p) == home), 0.0)

    def frozen_on(self, host: bool) -> float:
        """Return the bytes of frozen weights on the GPU, or with `host` in host memory."""
        offload = self.run.memory.offload
        return sum((n for part, n in self.frozen.items() if (self.home(part) in offload) == host), 0.0)

    @property
    def whole_layer(self) -> float:
        """Numbers that ZeRO-3 gathers for a compiled layer, whose weights come all at once."""
        compiled = self.run.kernels.compile
        if compiled == "auto":
            # The plan is for GPUs.
            compiled = self.run.backbones.dtype == "bfloat16"
        return float(self.model["layer"] * (compiled and self.degrees.world > 1))

    @property
    def unpacked(self) -> float:
        """Bytes of the largest layer that is unpacked to work."""
        packed = [self.model["quantizable"][part] for part in self.run.memory.quantize]
        wide = self.model["float32"]
        sizes = (one["largest"] * (FP32 if [*one["numbers"]] == wide else self.width) for one in packed)
        return float(max(sizes, default=0))


def numbers(units: Answer, ranks: int, what: Sequence[str] = ("layer", "rest")) -> int:
    """Return how many numbers of FSDP2's units a rank has: it cuts by rows and pads the last ranks."""
    times = {"layer": units["layers"], "rest": 1}
    return sum(
        times[name] * count * math.ceil(rows / ranks) * ranks * columns
        for name in what
        for rows, columns, count in units[name]
    )


def states(rank: RankWorkload) -> dict[str, float]:
    """Return the bytes that a rank stores throughout a step."""
    split, trained = rank.degrees.split, rank.trained
    # ZeRO-3 has its shards in the working type, with float32 masters of what is trained. Weights in fp32 are their own.
    working = FP32 if split else rank.width
    # ZeRO-3 has its bucket from the start.
    bucket = BUCKET * (rank.degrees.world > 1 and not split)
    return {
        "frozen weights": rank.frozen_on(host=False),
        "working weights": working * trained,
        "master weights": (FP32 - working) and FP32 * trained,
        "moments": MOMENTS * trained,
        "moving average": _average(rank.run) * trained,
        "gradients": FP32 * (trained + bucket),
    }


def moments(rank: RankWorkload, step: Answer, slices: Answer | None) -> dict[str, MemoryPeak]:
    """Return what the fullest GPU stores beside its states, at each time of a step that can be the peak.

    step: a measured micro-batch; slices: of a split DiT, measured alike.
    """
    frozen: list[tuple[str, float]] = []
    others: list[tuple[str, float]] = []
    for name, size in step["peaks"].items():
        phase, part = name.split()
        (others if rank.is_sharded(part) or phase == "backward" or part == "rest" else frozen).append((part, size))
    largest = max((size + rank.comes(part) for part, size in frozen), default=0)
    found = {"encoders at work": MemoryPeak(activations=largest + rank.unpacked)}
    if slices is None:
        gathered = rank.width * min(LIVE + rank.whole_layer, sharded(rank)) * (rank.degrees.world > 1)
        # They are reduced all at once, too.
        whole = rank.width * min(rank.whole_layer, sum(map(rank.learns, rank.run.stage.trains)))
        found["end of forward"] = MemoryPeak(gathered, activations=sum(step["kept"].values()))
        at_work = max(size for _, size in others) + rank.unpacked
        found["layers at work"] = MemoryPeak(gathered, whole, activations=at_work)
        return found
    first, width, bridge = slices["places"][0], rank.width, rank.model["bridge"]
    kept = sum(size for part, size in step["kept"].items() if rank.home(part) == "bridge")
    under_way = first["kept"] * rank.degrees.pp + first["peak"] - first["kept"]
    rest = numbers(bridge, rank.degrees.world, ["rest"])
    dit = numbers({**first, "layers": 1}, rank.degrees.dp) * (rank.degrees.dp > 1)
    summed = rank.share["dit"] * ("dit" in rank.run.stage.trains and rank.degrees.dp > 1)
    # Torch's pipeline sums a DiT's gradients whole for a round.
    found["end of forward"] = MemoryPeak(width * (rest + dit), FP32 * summed, kept + under_way)
    if "pathway" in rank.run.stage.trains:
        # FSDP2 goes back through the layers: halfway through one it has its weights and those of the next, and the
        # gradients of the one behind it in float32; as one is reduced there are two such buffers beside its own
        # gradients (torch 2.12 fills the second while a loop variable still holds the first).
        layer, layers = numbers({**bridge, "layers": 1}, rank.degrees.world, ["layer"]), bridge["layers"]
        halfway = MemoryPeak(width * (rest + 2 * layer), FP32 * layer, step["peaks"].get("backward pathway", 0))
        left = kept * max(0, layers - 2) / layers
        reduced = MemoryPeak(width * (rest + layer), (2 * FP32 + width) * layer, left)
        found["backward of the bridge"] = fullest([halfway, reduced])
    return found


def fullest(moments: Iterable[MemoryPeak]) -> MemoryPeak:
    return max(moments, key=lambda moment: moment.total)


def sharded(rank: RankWorkload) -> float:
    return float(sum(n for part, n in rank.model["parts"].items() if rank.is_sharded(part)))


def host(rank: RankWorkload, images: int) -> dict[str, float]:
    """Return the bytes of host memory of one rank; images: per sample, its target included."""
    run, model, resolution = rank.run, rank.model, rank.run.stage.resolution
    # DeepSpeed's engine shards each block as it is read; a DiT that is split is read whole and then cut.
    whole = sum(n / (1 if rank.degrees.split else rank.shards(part)) for part, n in model["parts"].items())
    micro_batches = rank.accumulation * (1 + run.data.workers)
    latents, tokens = (round(resolution / model[px]) ** 2 for px in ("latent_px", "token_px"))
    features = latents * model["latent_channels"] + tokens * model["width"]
    return {
        "libraries": LIBRARIES,
        # Before anything goes to the GPU.
        "weights while loading": rank.width * whole,
        "checkpoint on its way out": (FP32 + MOMENTS + _average(run)) * rank.trained,
        "images read ahead": float(micro_batches * rank.micro * images * 3 * resolution**2),
        "offloaded weights": rank.frozen_on(host=True),
        "features remembered": float(run.memory.cached_images * features * rank.width),
    }


def host_total(memory: Mapping[str, float]) -> float:
    """Return the peak: the weights are on the GPU before the first batch is read."""
    loading = memory["weights while loading"]
    running = sum(v for name, v in memory.items() if name not in ("libraries", "weights while loading"))
    return memory["libraries"] + max(loading, running)


def checkpoint(model: Answer, run: StageRun, earlier: Iterable[str]) -> float:
    """Return the bytes on disk, all in fp32: weights and moments of trained parts, weights of carried parts.

    Carried is what no backbone gave, and parts of backbones that stages before have trained (`earlier`).
    """
    # Adapters stand for the parts that have them: the weights they adapt are the backbones' and are not saved.
    parts, trains = {**model["parts"], **model["adapters"]}, run.stage.trains
    # Whatever can rest in host memory is loaded with the model, as a generator is.
    given = {*run.recipe.backbones, *run.recipe.offloadable}
    carried = {part for part in run.recipe.modules if model["homes"].get(part, "") not in given} | set(earlier)
    of_trained = (FP32 + MOMENTS + _average(run)) * sum(parts[part] for part in trains)
    return float(of_trained + FP32 * sum(n for part, n in parts.items() if part in carried - set(trains)))


def _average(run: StageRun) -> int:
    """Bytes for each trained parameter of the moving average of the weights, if the stage keeps one."""
    return FP32 if run.stage.optimizer.ema_decay is not None else 0


Traffic = Counter[tuple[str, int]]  # (collective, ranks) -> bytes


def traffic(rank: RankWorkload) -> dict[str, float]:
    """Return the bytes that the busiest rank exchanges in an optimizer step, by "collective over ranks".

    They are those of the whole tensors: of what is gathered, reduced or scattered, once. Of a gathering or scattering
    in a ring over n ranks (n - 1) / n of them cross a rank's link, of an all-reduce twice as many. Exchanges of single
    numbers (the norm, the losses) are left out. benchmarks/at_scale.py counts the same on the engines themselves.
    """
    if rank.slices is None:
        found = [_zero3(rank)]
    else:
        found = [_bridge(rank) + _dit(rank, place) for place in range(rank.degrees.pp)]
    busiest = max(found, key=lambda one: sum(one.values()))
    return {
        f"{kind} over {ranks}": rank.accumulation * size
        for (kind, ranks), size in busiest.items()
        if ranks > 1 and size
    }


def _zero3(rank: RankWorkload) -> Traffic:
    """Every weight forward and again backward, but for those that are still there; gradients in float32."""
    whole, world = sharded(rank), rank.degrees.world
    trained = sum({**rank.model["parts"], **rank.model["adapters"]}[part] for part in rank.run.stage.trains)
    gathered = rank.width * (2 * whole - min(whole, LIVE))
    return Counter({("all_gather", world): gathered, ("reduce_scatter", world): FP32 * trained})


def _bridge(rank: RankWorkload) -> Traffic:
    """Layers forward and again backward; what is in none of them stays gathered in between.

    Conditions go to all ranks of a model group, with the points at which the DiT computes velocities; gradients of the
    conditions come back.
    """
    assert rank.slices is not None
    world, group, bridge = rank.degrees.world, rank.degrees.tp * rank.degrees.pp, rank.model["bridge"]
    layers, rest = (numbers(bridge, world, [what]) for what in ("layer", "rest"))
    trained = any(rank.home(part) == "bridge" for part in rank.run.stage.trains)
    # x_t and v, and the velocity of the contrastive partner.
    fields = 3 if rank.run.stage.objective.pairs else 2
    states, points = rank.slices["states"], fields * rank.slices["points"]
    found = {("all_gather", world): rank.width * (2 * layers + rest)}
    found["reduce_scatter", world] = FP32 * (layers + rest) * trained
    return Counter(found) + Counter(
        {("all_gather", group): group * (states + points), ("scatter", group): group * states}
    )


def _dit(rank: RankWorkload, place: int) -> Traffic:
    """One round of the pipeline, of as many micro-batches as a DiT has ranks."""
    assert rank.slices is not None
    degrees, units = rank.degrees, rank.slices["places"][place]
    rounds = degrees.tp * degrees.pp
    slots = list(order(place, degrees.pp, rounds))
    # Forward leaves a block sharded behind it, backward leaves it whole until its next forward.
    gathers = sum(i == 0 or not slots[i - 1][0] for i in range(len(slots)))
    layers, rest = (numbers(units, degrees.dp, [what]) for what in ("layer", "rest"))
    found: Traffic = Counter({("all_gather", degrees.dp): rank.width * (gathers * layers + rest)})
    found["reduce_scatter", degrees.dp] = FP32 * (layers + rest) * ("dit" in rank.run.stage.trains)
    found["all_reduce", degrees.tp] = rounds * units["reduced"]
    found["send", degrees.pp] = rounds * units["exchanged"]
    found["receive", degrees.pp] = rounds * units["exchanged"]
    return found
