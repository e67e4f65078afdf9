"""A step of one rank of a large world, counted: memory by purpose, bytes by collective, work by pipeline slot."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.distributed.pipelining import PipelineStage
from torch.testing._internal.distributed.fake_pg import FakeStore

from wemmu.config.schema import StageRun
from wemmu.measuring.fake_world import FakeWorld, Traffic, fake_world
from wemmu.measuring.model import make_batch, make_model
from wemmu.parallel.topology import Topology
from wemmu.planning.ask import Shape
from wemmu.planning.schedule import Slot
from wemmu.training.build import make_engine

WEIGHTS, MOMENTS, GRADIENTS, GATHERED, ACTIVATIONS = "weights", "moments", "gradients", "gathered", "activations"
Call = Callable[..., Any]


@dataclass
class Measured:
    """Of one rank. peak, memory: bytes, by what they are for; traffic: of one step; slots: of one round, in order."""

    peak: int = 0
    memory: dict[str, int] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    slots: list[Slot] = field(default_factory=list)


def measure(run: StageRun, shape: Shape, rank: int) -> Measured:
    """Take the place of `rank` for an optimizer step of `run`, with samples of this shape.

    All micro-batches after the first are alike, so two are run, and the second counts for all of them. A step before
    makes the moments, and lets the engine learn the order of its modules.
    """
    world = run.parallel.ranks
    micro, accumulation = run.memory.micro_batch_at(run.stage.resolution, run.stage.global_batch, world)
    # Be `rank` of `world` ranks, of which the others are not there: collectives return at once.
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    found = Measured()
    with fake_world() as mode, _buffers(mode), _slots(mode) as slots:
        model, loss = make_model(run)
        batch = make_batch(model, run, asdict(replace(shape, samples=micro, padded=micro > 1)))
        topology = Topology(rank, world, run.parallel.tp, run.parallel.pp)
        engine = make_engine(run, model, loss, topology, torch.device("cpu"))
        engine.accumulate([batch], 0)
        engine.step(1.0)
        slots.clear()
        mode.forget_peak()

        def at_peak() -> None:
            found.memory = by_purpose(mode, model, engine)

        mode.at_peak = at_peak
        mode.traffic = Traffic()
        engine.accumulate([batch], 1)
        found.slots = list(slots)
        if accumulation > 1:
            first, mode.traffic = mode.traffic, Traffic()
            engine.accumulate([batch], 1)
            _add(first, mode.traffic, accumulation - 1)
            mode.traffic = first
        engine.step(1.0)
        found.traffic, found.peak = mode.traffic, mode.peak
    return found


def _add(traffic: Traffic, other: Traffic, times: int) -> None:
    for mine, theirs in ((traffic.calls, other.calls), (traffic.bytes, other.bytes)):
        mine.update({collective: times * number for collective, number in theirs.items()})


@contextmanager
def _slots(mode: FakeWorld) -> Iterator[list[Slot]]:
    """Yields the slots that torch's pipeline fills on this stage, as it fills them."""
    found: list[Slot] = []

    def watched(backward: bool, original: Call) -> Call:
        def run(stage: PipelineStage, number: int, *args: Any, **kwargs: Any) -> Any:
            before = mode.flops
            out = original(stage, number, *args, **kwargs)
            found.append(Slot(backward, number, mode.flops - before))
            return out

        return run

    with ExitStack() as stack:
        for name, backward in (("forward_one_chunk", False), ("backward_one_chunk", True)):
            original = getattr(PipelineStage, name)
            stack.enter_context(mock.patch.object(PipelineStage, name, watched(backward, original)))
        yield found


@contextmanager
def _buffers(mode: FakeWorld) -> Iterator[None]:
    """Tell `mode` what FSDP2's buffers are for, and that what it reduces is gradients, which no parameter has then."""
    reduce = _fsdp_param_group.foreach_reduce

    def watched(purpose: str, original: Call) -> Call:
        def allocate(*args: Any, **kwargs: Any) -> Any:
            mode.purpose = purpose
            try:
                return original(*args, **kwargs)
            finally:
                mode.purpose = None

        return allocate

    def foreach_reduce(parameters: Any, gradients: Any, *args: Any, **kwargs: Any) -> Any:
        for gradient in gradients:
            mode.claim(gradient.untyped_storage(), GRADIENTS)
        return reduce(parameters, gradients, *args, **kwargs)

    with ExitStack() as stack:
        for owner, purpose in ((DefaultAllGather, GATHERED), (DefaultReduceScatter, GRADIENTS)):
            stack.enter_context(mock.patch.object(owner, "allocate", watched(purpose, owner.allocate)))
        stack.enter_context(mock.patch.object(_fsdp_param_group, "foreach_reduce", foreach_reduce))
        yield


def by_purpose(mode: FakeWorld, model: Any, engine: Any) -> dict[str, int]:
    """Bytes of everything there is now, by what it is for; what is nobody's is an activation, or passing."""
    of = dict.fromkeys((WEIGHTS, MOMENTS, GRADIENTS, GATHERED, ACTIVATIONS), 0)
    owners: dict[int, str] = {}
    for owner, tensor in _tensors(model, engine):
        owners.setdefault(tensor.untyped_storage()._cdata, owner)
    for key, (size, purpose) in mode.storages().items():
        of[owners.get(key, purpose or ACTIVATIONS)] += size
    return of


def _tensors(model: Any, engine: Any) -> Iterator[tuple[str, Tensor]]:
    for part in (model.vlm, model.vae):
        yield from ((WEIGHTS, tensor) for tensor in (*part.parameters(), *part.buffers()))
    yield from _of_zero3(engine) if hasattr(engine, "_zero") else _of_hybrid(model, engine)


def _of_hybrid(model: Any, engine: Any) -> Iterator[tuple[str, Tensor]]:
    for parameter in engine._sharded.values():
        yield WEIGHTS, parameter.to_local()
        if parameter.grad is not None:
            yield GRADIENTS, parameter.grad.to_local()
    for state in engine._adamw._optimizer.state.values():
        yield from ((MOMENTS, tensor) for tensor in state.values())
    for root in (model.bridge, engine._pipeline.runner):
        for module in root.modules():
            if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group):
                for parameter in group.fsdp_params:
                    yield from ((GATHERED, tensor) for tensor in parameter.all_gather_outputs)
                    grad = getattr(getattr(parameter, "_unsharded_param", None), "grad", None)
                    whole = (grad, parameter.unsharded_accumulated_grad)
                    yield from ((GRADIENTS, tensor) for tensor in whole if tensor is not None)


def _of_zero3(engine: Any) -> Iterator[tuple[str, Tensor]]:
    zero = engine._zero
    for parameter in engine._engine.module.parameters():
        yield WEIGHTS, parameter.ds_tensor
        yield GATHERED, parameter.data
        if parameter.grad is not None:
            yield GRADIENTS, parameter.grad
    yield from ((WEIGHTS, master) for master in zero.fp32_partitioned_groups_flat)
    for state in zero.optimizer.state.values():
        yield from ((MOMENTS, tensor) for tensor in state.values() if isinstance(tensor, Tensor))
    yield GRADIENTS, zero.grad_partitions_flat_buffer
    for bucket in zero.ipg_buckets.values():
        if isinstance(bucket.buffer, Tensor):
            yield GRADIENTS, bucket.buffer
