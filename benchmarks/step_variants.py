"""The variants of a training step that `benchmarks.step` compares, ready to be taken, and proof that they agree."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.naive import Mask, NaiveModel, Way
from benchmarks.step_sizes import Cell, Size, make_batch, make_model, make_run
from wemmu import kernels
from wemmu.config import StageRun
from wemmu.config.schema import Kernels
from wemmu.measuring.fake_world import fake_world
from wemmu.parallel.engine import Engine
from wemmu.parallel.single import SingleEngine
from wemmu.parallel.topology import ALONE
from wemmu.recipes.wemmu.loss import FlowMatchingLoss
from wemmu.recipes.wemmu.model import WeMMU
from wemmu.training.build import give_kernels, make_engine
from wemmu.types import Batch, Prefix


@dataclass(frozen=True)
class Own:
    """Our step. checkpointing: whether layers are recomputed."""

    checkpointing: bool = False
    kernels: Kernels = field(default_factory=Kernels)


# The first is what the others are compared with.
OURS = {"ours": Own(), "ours, checkpointing": Own(checkpointing=True)}
# On a GPU, what the kernels gain. Nothing can be given back its plain kernel, so it has a process of its own.
PLAIN = {
    "ours, plain kernels": Own(kernels=Kernels(fused_norms=False, compile=False, narrow_attention=False, noise="host"))
}
# The frozen autoencoder's convolutions with channels last in memory.
CHANNELS_LAST = {"ours, channels_last": Own(kernels=Kernels(channels_last=True))}
# What it costs that every run computes the same bits: it is switched on for the whole process.
DETERMINISTIC = {"ours, deterministic": Own(kernels=Kernels(deterministic=True))}
NAIVE = {
    "naive": Way(),
    "naive, no logits": Way(logits=False),
    "naive, no logits, no checkpointing": Way(logits=False, checkpointing=False),
    "MetaQuery's: VLM frozen, causal mask, no logits": Way(trained=False, logits=False, mask="causal"),
}
VARIANTS = (*OURS, *NAIVE)
# Where each has a process of its own, which builds 11 B parameters first, those between the two are left out.
ENDS = (*OURS, "naive", "MetaQuery's: VLM frozen, causal mask, no logits")
# How far conditions and losses of two variants may be apart in float32, relative to their norm.
TOLERANCE = 1e-4
# In bfloat16 each variant rounds in its own way, through tens of layers, so none is right. Both are held against
# float32: neither may be farther off than the other by this factor, where that is more than one rounding.
FARTHER, ROUNDING = 2.0, 2.0**-8

Step = Callable[[], None]


# The DiT's condition and the losses of a batch.
Outcome = tuple[Tensor, Tensor]


@dataclass
class Off:
    """The largest distances, relative to the norm. off: of a naive variant from ours, both in float32. off_ours,
    off_naive: of each in bfloat16 from ours in float32; 0 where nothing is computed in bfloat16."""

    off: float = 0.0
    off_ours: float = 0.0
    off_naive: float = 0.0


def prepare(
    size: Size, cell: Cell, names: Iterable[str], engine: str, device: torch.device, dtype: str
) -> tuple[dict[str, Step], Off]:
    """Name -> a function that takes one whole training step: losses, gradients, clipping, AdamW.

    Variants of one kind share a model; each function sets it to its own way first. Ours and the naive ones have equal
    weights, and before anything steps they are held against each other; the largest distances are returned with them.

    Raises:
        AssertionError: if a naive variant does not compute what ours does.
    """
    names = list(names)
    ways = {name: NAIVE[name] for name in names if name in NAIVE}
    run, model = make_run(cell, engine, dtype), make_model(size, device, getattr(torch, dtype))
    batch = make_batch(size, cell, model.vlm.token_px)
    masks = {way.mask for way in ways.values()}
    ours = {mask: outcome(model, run, batch.to(device), mask) for mask in masks}
    steps: dict[str, Step] = {}
    off = Off()
    if ways:
        narrow = getattr(torch, dtype) != torch.float32
        exact = in_float32(model, cell, run, batch.to(device), ways, off) if narrow else ours
        apart = len(ways) < len(names)
        naive = NaiveModel(deepcopy(model) if apart else model)
        if not apart:
            del model.bridge.pathway
        for name, way in ways.items():
            naive.go(way, "dit" in cell.trains)
            found = outcome(naive, run, batch.to(device))
            if narrow:
                assert_as_near(name, found, ours[way.mask], exact[way.mask], off)
            else:
                off.off = max(off.off, assert_equal(name, found, exact[way.mask]))
        steps |= _naive_steps(naive, run, batch, ways, device)
    every = OURS | PLAIN | CHANNELS_LAST | DETERMINISTIC
    own = {name: every[name] for name in names if name in every}
    if own:
        steps |= our_steps(model, run, batch, own, device)
    return {name: steps[name] for name in names}, off


def in_float32(
    model: WeMMU, cell: Cell, run: StageRun, batch: Batch, ways: dict[str, Way], off: Off
) -> dict[Mask, Outcome]:
    """What ours computes under each mask where nothing is rounded to 16 bits; the naive variants must compute the same.

    The copy in float32 is gone when this returns.
    """
    copy = deepcopy(model).float()
    # A GPU's convolutions would round to 10 bits otherwise.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = {mask: outcome(copy, run, batch, mask) for mask in {way.mask for way in ways.values()}}
        naive = NaiveModel(copy)
        del copy.bridge.pathway
        for name, way in ways.items():
            naive.go(way, "dit" in cell.trains)
            off.off = max(off.off, assert_equal(name, outcome(naive, run, batch), exact[way.mask]))
    return exact


@torch.no_grad()
def outcome(model: Any, run: StageRun, batch: Batch, mask: Mask = "pathway") -> Outcome:
    """The condition's states and the losses of the batch in `model`, a WeMMU or a NaiveModel.

    With `mask` "causal" our pathway runs under that mask.
    """
    loss = FlowMatchingLoss(model, run)
    with causal_pathway(model) if mask == "causal" else nullcontext():
        condition = loss.condition(batch, 0)
    flow = loss.draw(batch, 0)
    return condition.states, loss.values(model.velocity(flow.x_t, flow.t, condition), flow)


def distances(one: Outcome, other: Outcome) -> dict[str, float]:
    """How far the condition and the losses of `one` are off those of `other`, relative to the norm of these."""
    pairs = zip(("condition is", "losses are"), one, other, strict=True)
    return {what: float((a.float() - b.float()).norm() / b.float().norm()) for what, a, b in pairs}


def assert_equal(name: str, theirs: Outcome, ours: Outcome) -> float:
    """The larger distance of the two, in float32.

    Raises:
        AssertionError: if it is more than rounding, naming the quantity.
    """
    off = distances(theirs, ours)
    for what, distance in off.items():
        assert distance <= TOLERANCE, f"{name}: its {what} {distance:.1e} off ours, more than {TOLERANCE:.0e}"
    return max(off.values())


def assert_as_near(name: str, theirs: Outcome, ours: Outcome, exact: Outcome, off: Off) -> None:
    """Note in `off` how far both are from `exact`, which nothing has rounded to 16 bits.

    Raises:
        AssertionError: if one of them is much farther off than the other, saying which.
    """
    of_ours, of_theirs = distances(ours, exact), distances(theirs, exact)
    off.off_ours, off.off_naive = max(off.off_ours, *of_ours.values()), max(off.off_naive, *of_theirs.values())
    for what in of_ours:
        pair = {"ours": of_ours[what], name: of_theirs[what]}
        (_, near), (farther, far) = sorted(pair.items(), key=lambda item: item[1])
        assert far <= FARTHER * max(near, ROUNDING), (
            f"{farther}: its {what} {far:.1e} off float32, the other's {near:.1e}, more than {FARTHER:g} times as far"
        )


@contextmanager
def causal_pathway(model: WeMMU) -> Iterator[None]:
    """Let our queries and VAE tokens see only those before them, as the VLM's own mask would have it."""
    pathway = model.bridge.pathway

    def forward(tokens: Tensor, positions: Tensor, prefix: Prefix, _: Tensor | None = None) -> Tensor:
        b, g = tokens.shape[:2]
        among_themselves = prefix.mask.new_ones(g, g).tril().expand(b, -1, -1)
        mask = torch.cat([prefix.mask[:, None, :].expand(-1, g, -1), among_themselves], dim=-1)
        return pathway.run(tokens, positions, prefix, mask)

    with mock.patch.object(pathway, "forward", forward):
        yield


def our_steps(model: WeMMU, run: StageRun, batch: Batch, ways: dict[str, Own], device: torch.device) -> dict[str, Step]:
    (config,) = {own.kernels for own in ways.values()}
    run = run.model_copy(update={"kernels": config})
    model.freeze_all_but(run.stage.trains)
    if config.deterministic:
        kernels.make_deterministic()
    _, layers = give_kernels(run, model, device)
    loss, dit = FlowMatchingLoss(model, run), model.dit
    if run.parallel.engine != "single" and not dist.is_initialized():
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    engine = make_engine(run, model, loss, ALONE, device, compiled=layers)
    # Makes the moments, so that no step has to.
    engine.state()

    def step_of(checkpointing: bool) -> Step:
        def step() -> None:
            if checkpointing:
                model.checkpoint_activations()
            else:
                model.bridge.pathway.checkpointing = False
                dit.disable_gradient_checkpointing()
            take(engine, batch, device)

        return step

    return {name: step_of(own.checkpointing) for name, own in ways.items()}


def _naive_steps(
    model: Any, run: StageRun, batch: Batch, ways: dict[str, Way], device: torch.device
) -> dict[str, Step]:
    """Variants that train the same share an engine, whose masters are the weights themselves or copies of them."""
    trains_dit = "dit" in run.stage.trains
    engines: dict[bool, Engine] = {}

    def step_of(way: Way) -> Step:
        def step() -> None:
            model.go(way, trains_dit)
            take(engines[way.trained], batch, device)

        return step

    for way in ways.values():
        if way.trained not in engines:
            model.go(way, trains_dit)
            loss = FlowMatchingLoss(model, run)
            engines[way.trained] = SingleEngine(model, loss, run)
            # Makes the moments, so that no step has to.
            engines[way.trained].state()
    return {name: step_of(way) for name, way in ways.items()}


def counted_flops(size: Size, cell: Cell, names: Iterable[str]) -> dict[str, int]:
    """FLOPs of the products in a step of each variant, counted on this machine without computing them."""
    device, run = torch.device("cpu"), make_run(cell, "single", "float32")
    found: dict[str, int] = {}
    with fake_world() as mode:
        model = make_model(size, device, torch.float32)
        batch = make_batch(size, cell, model.vlm.token_px)

        def count(steps: dict[str, Step]) -> None:
            for name, step in steps.items():
                before = mode.flops
                step()
                found[name] = mode.flops - before

        count(our_steps(model, run, batch, {name: OURS[name] for name in names if name in OURS}, device))
        ways = {name: NAIVE[name] for name in names if name in NAIVE}
        count(_naive_steps(NaiveModel(model), run, batch, ways, device))
    return found


def take(engine: Engine, batch: Batch, device: torch.device) -> None:
    """What the trainer does for a step, and until the device is done."""
    engine.accumulate([batch.to(device)], 0)
    engine.step(1.0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
