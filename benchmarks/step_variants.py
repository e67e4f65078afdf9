"""The variants of a training step that `benchmarks.step` compares, ready to be taken, and proof that they agree."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from unittest import mock

import torch
from torch import Tensor

from benchmarks.naive import NaiveModel, Way
from benchmarks.step_sizes import Cell, Size, floor_flops, make_batch, make_model, make_run, samples_of
from wemmu.config import StageRun
from wemmu.models.model import WeMMU
from wemmu.parallel.engine import Engine
from wemmu.parallel.single import SingleEngine
from wemmu.parallel.topology import ALONE
from wemmu.planning.flops import dit as dit_work
from wemmu.planning.flops import pathway, prefix
from wemmu.training.losses import FlowMatchingLoss
from wemmu.types import Batch, Prefix

# Whether layers are recomputed; the first is what the others are compared with.
OURS = {"ours": False, "ours, checkpointing": True}
NAIVE = {
    "naive": Way(),
    "naive, no logits": Way(logits=False),
    "naive, no logits, no checkpointing": Way(logits=False, checkpointing=False),
    "MetaQuery's: VLM frozen, causal mask, no logits": Way(trained=False, logits=False, mask="causal"),
}
VARIANTS = (*OURS, *NAIVE)
# Where each has a process of its own, which builds 11 B parameters first, those between the two are left out.
ENDS = (*OURS, "naive", "MetaQuery's: VLM frozen, causal mask, no logits")
# Of conditions and losses, relative to their norm. bfloat16 has 8 bits, through tens of layers.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

Step = Callable[[], None]


def prepare(
    size: Size, cell: Cell, names: Iterable[str], engine: str, device: torch.device, dtype: str
) -> tuple[dict[str, Step], float]:
    """Name -> a function that takes one whole training step: losses, gradients, clipping, AdamW.

    Variants of one kind share a model; each function sets it to its own way first. Ours and the naive ones have equal
    weights, and before anything steps they are held against each other; the largest difference is returned with them.

    Raises:
        AssertionError: if a naive variant does not compute what ours does.
    """
    names = list(names)
    ways = {name: NAIVE[name] for name in names if name in NAIVE}
    run, model = make_run(size, cell, engine, dtype), make_model(size, device, getattr(torch, dtype))
    batch = make_batch(size, cell, model.vlm.token_px)
    ours = {mask: outcome(model, run, batch.to(device), mask) for mask in {way.mask for way in ways.values()}}
    steps: dict[str, Step] = {}
    off = 0.0
    if ways:
        apart = len(ways) < len(names)
        naive = NaiveModel(deepcopy(model) if apart else model)
        if not apart:
            del model.bridge.pathway
        for name, way in ways.items():
            naive.go(way, "dit" in cell.trains)
            off = max(off, assert_equal(name, outcome(naive, run, batch.to(device)), ours[way.mask]))
        steps |= _naive_steps(naive, run, batch, ways, device)
    recompute = {name: OURS[name] for name in names if name in OURS}
    if recompute:
        steps |= _our_steps(model, run, batch, recompute, device)
    return {name: steps[name] for name in names}, off


@torch.no_grad()
def outcome(model: WeMMU | NaiveModel, run: StageRun, batch: Batch, mask: str = "pathway") -> tuple[Tensor, Tensor]:
    """The condition's states and the losses of the batch; with `mask` "causal" our pathway runs under that mask."""
    loss = FlowMatchingLoss(model, run)
    with causal_pathway(model) if mask == "causal" else nullcontext():
        condition = loss.condition(batch, 0)
    flow = loss.draw(batch, 0)
    return condition.states, loss.values(model.velocity(flow.x_t, flow.t, condition), flow)


def assert_equal(name: str, theirs: tuple[Tensor, Tensor], ours: tuple[Tensor, Tensor]) -> float:
    """The larger difference of the two pairs (condition, losses), relative to the norm of ours.

    Raises:
        AssertionError: if it is more than rounding, naming the quantity.
    """
    allowed, largest = TOLERANCE[ours[0].dtype], 0.0
    for what, a, b in zip(("condition is", "losses are"), theirs, ours, strict=True):
        off = float((a - b).norm() / b.norm())
        assert off <= allowed, f"{name}: its {what} {off:.1e} off ours, more than {allowed:.0e}"
        largest = max(largest, off)
    return largest


@contextmanager
def causal_pathway(model: WeMMU) -> Iterator[None]:
    """Let our queries and VAE tokens see only those before them, as the VLM's own mask would have it."""
    pathway = model.bridge.pathway

    def forward(tokens: Tensor, positions: Tensor, prefix: Prefix) -> Tensor:
        b, g, _ = tokens.shape
        among_themselves = prefix.mask.new_ones(g, g).tril().expand(b, -1, -1)
        mask = torch.cat([prefix.mask[:, None, :].expand(-1, g, -1), among_themselves], dim=-1)
        return pathway.run(tokens, positions, prefix, mask)

    with mock.patch.object(pathway, "forward", forward):
        yield


def _our_steps(
    model: WeMMU, run: StageRun, batch: Batch, recompute: dict[str, bool], device: torch.device
) -> dict[str, Step]:
    model.freeze_all_but(run.stage.trains)
    engine, dit = _engine(model, run, device), model.dit
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

    return {name: step_of(checkpointing) for name, checkpointing in recompute.items()}


def _naive_steps(
    model: NaiveModel, run: StageRun, batch: Batch, ways: dict[str, Way], device: torch.device
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
            engines[way.trained] = SingleEngine(model, loss, run.stage.optimizer, run.stage.global_batch)
            # Makes the moments, so that no step has to.
            engines[way.trained].state()
    return {name: step_of(way) for name, way in ways.items()}


def _engine(model: WeMMU, run: StageRun, device: torch.device) -> Engine:
    loss = FlowMatchingLoss(model, run)
    if run.parallel.engine == "single":
        return SingleEngine(model, loss, run.stage.optimizer, run.stage.global_batch)
    from wemmu.parallel.zero3 import Zero3Engine

    return Zero3Engine(model, loss, run, ALONE, device)


def executed_flops(size: Size, cell: Cell, run: StageRun, name: str) -> float:
    """FLOPs of a variant's products by the plan's arithmetic, recomputation and logits included, padding not.

    The naive language model computes every pair of tokens, whatever its mask hides; so does our pathway.
    """
    language, flops = size.sizes.language, floor_flops(size, cell, run)
    for sample in samples_of(size, cell, run):
        ours, dit = (
            pathway(language, sample.pathway, sample.prefix),
            dit_work(size.sizes.dit, sample.latents, sample.queries),
        )
        if name in OURS:
            flops += OURS[name] * (ours.forward + dit.forward)
            continue
        way, tokens = NAIVE[name], sample.prefix + sample.pathway
        whole = pathway(language, tokens, 0)
        flops -= prefix(language, sample.prefix) + ours.forward + ours.backward(trained=True, passed=True)
        flops += whole.forward + whole.backward(way.trained, passed=True)
        flops += way.checkpointing * (whole.forward + dit.forward)
        flops += way.logits * 2.0 * tokens * language.hidden_size * language.vocab_size
    return flops


def take(engine: Engine, batch: Batch, device: torch.device) -> None:
    """What the trainer does for a step, and until the device is done."""
    engine.accumulate([batch.to(device)], 0)
    engine.step(1.0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
