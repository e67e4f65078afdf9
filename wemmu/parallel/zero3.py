"""DeepSpeed ZeRO-3: weights, gradients and moments of all trainable parameters, sharded over all ranks.

Everything that any stage can train is sharded; the autoencoder and a frozen VLM stay whole on every rank. DeepSpeed
gathers the weights of a module for its turn in forward and backward.

Only this file uses DeepSpeed beyond its documented interface; read in and tested with 0.19.8.
"""

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from wemmu.checkpoint.sharded_tensor import ShardedTensor, flat_parts
from wemmu.checkpoint.state import TrainState
from wemmu.config.schema import StageRun
from wemmu.parallel.adamw import average
from wemmu.parallel.topology import Topology
from wemmu.types import Batch, Losses, LossFn

# In elements. Gradients are reduced, and weights gathered ahead of their turn, in buckets of this size, which is more
# than the largest matrix of the published backbones has. Weights that are soon used again stay gathered, as many as
# `LIVE`; those of at most `PERSISTENT` elements always do.
BUCKET = 50_000_000
LIVE = 1_000_000_000
PERSISTENT = 10_000


class _Trainable(nn.Module):
    """The sharded modules under canonical names. Its forward computes the loss.

    DeepSpeed follows the order of its modules from one such call to the next, to gather ahead.
    """

    def __init__(self, model: Any, loss: LossFn):
        super().__init__()
        for part in model.sharded:
            *outer, name = part.split(".")
            place: nn.Module = self
            for word in outer:
                if word not in dict(place.named_children()):
                    place.add_module(word, nn.Module())
                place = place.get_submodule(word)
            place.add_module(name, model.get_submodule(part))
        self._loss = loss

    def forward(self, batch: Batch, step: int) -> Losses:
        return self._loss(batch, step)


def _unsharded(module: nn.Module, sharded: Sequence[str], before: str = "") -> Iterator[nn.Module]:
    """Yield the parts of a model that are outside of those named in `sharded`, as whole as possible."""
    for name, part in module.named_children():
        path = before + name
        if any(one.startswith(f"{path}.") for one in sharded):
            yield from _unsharded(part, sharded, f"{path}.")
        elif path not in sharded:
            yield part


class _Linear(torch.autograd.Function):
    """y = x W^T + b that saves W itself for the backward pass, not a view of it.

    Autograd's own remembers W^T, a view, and so holds the memory of all gathered weights from forward to backward. W
    itself is gathered anew by DeepSpeed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)  # [N, out]
        return (
            gradient @ weight if needed[0] else None,
            rows.t() @ x.flatten(0, -2) if needed[1] else None,
            rows.sum(0) if needed[2] else None,
        )


class _SavingLinear(nn.Linear):
    """A class of its own instead of a replaced `forward`, so torch.compile compiles once for all layers."""

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self.weight, self.bias)


class _FlatShards:
    """All shards of a rank end to end, in one flat tensor for each type.

    DeepSpeed's own `defragment` refuses more than one type; the rest of its ZeRO-3 treats each parameter in its own.
    """

    def __init__(self, shards: Sequence[Tensor]):
        from deepspeed.runtime.zero.utils import defragment

        of_type: dict[torch.dtype, list[Tensor]] = {}
        # Where each shard begins: end to end over all types, as DeepSpeed counts, and in the tensor of its type.
        self._begins: dict[int, tuple[torch.dtype, int]] = {}
        total = 0
        for one in shards:
            before = of_type.setdefault(one.dtype, [])
            self._begins[total] = one.dtype, sum(other.numel() for other in before)
            before.append(one)
            total += one.numel()
        self._flat = {dtype: defragment(several) for dtype, several in of_type.items()}

    def narrow(self, dim: int, start: int, length: int) -> Tensor:
        """Return `length` elements from `start` on: whole shards, all of one dtype."""
        dtype, begin = self._begins[start]
        return self._flat[dtype].narrow(dim, begin, length)


class Zero3Engine:
    """See `wemmu.parallel.engine.Engine`. Shards parts of the model in place, where `shard` has not already."""

    def __init__(
        self,
        model: Any,
        loss: LossFn,
        run: StageRun,
        topology: Topology,
        device: torch.device,
        compiled: Iterable[nn.Module] = (),
    ):
        """Shards the parts of the model, an nn.Module, that it calls `sharded`; the others stay whole, untrained.

        compiled: layers whose weights are gathered all at once. Raises ValueError if there is nothing to train.
        """
        self._deepspeed = load_deepspeed(device)
        self._model, self._world, self._global_batch = model, topology.world, run.stage.global_batch
        for part in _unsharded(model, model.sharded):
            part.to(device)
        trainable = _Trainable(model, loss)
        shard(trainable, device)
        for layer in set(compiled) & set(trainable.modules()):
            _gather_whole(layer)
        # DeepSpeed gives parameters attributes: ds_id, ds_shape, ds_numel, ds_tensor.
        self._trained: dict[str, Any] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._trained:
            raise ValueError("nothing to train: every parameter is frozen")

        # DeepSpeed keeps a group's shards in one flat tensor, hence one type in each.
        groups: dict[tuple[torch.dtype, tuple[float, float]], list[nn.Parameter]] = {}
        for name, parameter in self._trained.items():
            key = parameter.dtype, run.rates(name, len(parameter.ds_shape))
            groups.setdefault(key, []).append(parameter)
        adamw = torch.optim.AdamW(
            [{"params": ps, "lr": lr, "peak_lr": lr, "weight_decay": wd} for (_, (lr, wd)), ps in groups.items()],
            betas=run.stage.optimizer.betas,
            fused=True,
        )
        config = _config(next(trainable.parameters()).dtype, run.stage.optimizer.clip)
        self._engine, *_ = self._deepspeed.initialize(
            model=trainable, optimizer=adamw, config=config, dist_init_required=False
        )
        self._zero: Any = self._engine.optimizer
        self._order = self._zero.parameter_offload.get_param_coordinator()
        _keep_for_backward(self._zero.parameter_offload)
        self._decay = run.stage.optimizer.ema_decay
        if self._decay is not None:
            # An average begins before the first step.
            self._fill_state()

    def accumulate(self, micro_batches: Sequence[Batch], step: int) -> list[Losses]:
        found = []
        for batch in micro_batches:
            losses = self._engine(batch, step)
            # DeepSpeed averages over the ranks; the loss needs the sum of their shares of the global mean.
            self._engine.backward(losses.values.sum() * (self._world / self._global_batch))
            found.append(losses.detached())
        return found

    def step(self, lr_share: float) -> float:
        for group in self._zero.param_groups:
            group["lr"] = group["peak_lr"] * lr_share
        # Leaves weights and moments alone where the norm is not finite.
        self._engine.step()
        # A parameter that the next step did not use would keep this gradient, and no other.
        self._zero.grad_partitions_flat_buffer.zero_()
        if self._order.is_record_trace():
            # DeepSpeed now knows the order of modules of a step; sample images between two steps do not count.
            self._order.reset_step()
        norm = float(self._engine.get_global_grad_norm())
        if self._decay is not None and math.isfinite(norm):
            flats = list(self._adamw_state)
            averages = [self._adamw_state[flat]["ema"] for flat in flats]
            average(averages, flats, self._decay, int(self._adamw_state[flats[0]]["step"]))
        return norm

    def _fill_state(self) -> None:
        for flat in self._zero.fp32_partitioned_groups_flat:
            if not self._adamw_state[flat]:
                # What AdamW makes at its first step, and the average.
                self._adamw_state[flat] = {
                    "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                    "exp_avg": torch.zeros_like(flat),
                    "exp_avg_sq": torch.zeros_like(flat),
                } | ({} if self._decay is None else {"ema": flat.detach().clone()})

    def state(self) -> TrainState:
        self._fill_state()
        steps = {int(state["step"]) for state in self._adamw_state.values()}
        assert len(steps) == 1, "all parameters take every step"
        utils = self._deepspeed.utils

        def kept(what: str) -> dict[str, Tensor]:
            return self._placed(lambda p: utils.safe_get_local_optimizer_state(p, what))

        return TrainState(
            weights=self._placed(utils.safe_get_local_fp32_param),
            exp_avg=kept("exp_avg"),
            exp_avg_sq=kept("exp_avg_sq"),
            steps=steps.pop(),
            ema={} if self._decay is None else kept("ema"),
        )

    def local_parameters(self, names: Iterable[str]) -> dict[str, Tensor]:
        parameters: dict[str, Any] = {name: self._model.get_parameter(name) for name in names}
        return {n: _place(p, p.ds_tensor) if hasattr(p, "ds_id") else p.detach() for n, p in parameters.items()}

    @torch.no_grad()
    def on_restore(self, steps: int) -> None:
        self.state()
        for state in self._adamw_state.values():
            state["step"].fill_(steps)
        # DeepSpeed looks at the masters at its next step only. In float32 both are the same memory.
        for working, master in zip(
            self._zero.fp16_partitioned_groups_flat, self._zero.fp32_partitioned_groups_flat, strict=True
        ):
            working.copy_(master)
        # Weights that stay gathered, trained ones or not, are gathered anew.
        self._zero.parameter_offload.partition_all_parameters()

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients accumulated so far, by name, for comparison with other engines."""
        return self._placed(self._deepspeed.utils.safe_get_local_grad)

    @property
    def _adamw_state(self) -> dict[Tensor, dict[str, Tensor]]:
        """The flat masters of this rank's shards -> their AdamW state."""
        return self._zero.optimizer.state

    def _placed(self, part: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        return {name: _place(p, part(p)) for name, p in self._trained.items()}


def shard(module: nn.Module, device: torch.device) -> None:
    """Leave each rank its part of every parameter of `module`, on `device`; all ranks must call it alike.

    A model that is sharded block by block, as its blocks get their weights, is never whole in memory. The weights are
    those of rank 0. What is sharded already stays as it is.
    """
    deepspeed = load_deepspeed(device)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))
        if type(part) is nn.Linear:
            part.__class__ = _SavingLinear
    new = [p for p in module.parameters() if not hasattr(p, "ds_id")]
    if new:
        deepspeed.zero.Init(module=module, config_dict_or_path=_config(new[0].dtype, clip=0.0), dtype=new[0].dtype)


def _keep_for_backward(offload: Any) -> None:
    """Let a layer that is recomputed keep the weights of modules whose backward pass has begun.

    A recomputation releases the weights it has used, including those of the module whose backward pass requested it.
    Then torch has no parameter to accumulate the gradient into. So the end of its backward pass releases them.
    """
    release = offload.post_sub_module_forward_function
    begun = offload.get_param_coordinator()._PartitionedParameterCoordinator__active_backward_submodules

    def release_unless_begun(module: nn.Module) -> None:
        if module.ds_id not in begun:
            release(module)

    offload.post_sub_module_forward_function = release_unless_begun


def _gather_whole(layer: nn.Module) -> None:
    """Let DeepSpeed gather and reduce all weights of a layer at once, for hooks within would break a compiled graph."""
    layer._z3_leaf = True  # type: ignore[assignment]
    layer.register_forward_pre_hook(_with_gradient)


def _with_gradient(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """DeepSpeed reduces when the inputs have their gradients; without any it would before there are gradients."""
    states, *rest = args
    if not torch.is_grad_enabled() or any(isinstance(x, Tensor) and x.requires_grad for x in args):
        return None
    return states.detach().requires_grad_(), *rest


def _place(parameter: Any, part: Tensor) -> ShardedTensor:
    """`part`: this rank's elements of a sharded parameter, flat; behind the last one's there may be padding."""
    return ShardedTensor(parameter.ds_shape, flat_parts(parameter.ds_shape, dist.get_rank() * part.numel(), part))


def load_deepspeed(device: torch.device) -> ModuleType:
    """Import DeepSpeed and let it take over torch's process groups; a process alone is given one.

    It reads LOCAL_RANK and nothing else of a launcher's environment.
    """
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    # Else it looks for one itself, and warns that there is none.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    if not dist.is_initialized():
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    import deepspeed
    from deepspeed.runtime.zero import stage3

    stage3.defragment = _FlatShards
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It would be compiled for minutes, for a collective that is not used.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False)
    return deepspeed


def _config(dtype: torch.dtype, clip: float) -> dict[str, Any]:
    return {
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": BUCKET,
            "stage3_prefetch_bucket_size": BUCKET,
            "stage3_max_reuse_distance": LIVE,
            "stage3_max_live_parameters": LIVE,
            "stage3_param_persistence_threshold": PERSISTENT,
            # It would replace `torch.nn.functional.linear` for all of this process; see `_Linear`.
            "memory_efficient_linear": False,
        },
        # Always said, for the default is to clip at 1.
        "gradient_clipping": clip,
        # Gradients are reduced and summed in float32, whatever the working type.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        # `step` ends an accumulation, after any number of micro-batches.
        "managed_gradient_accumulation": False,
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": 1,
        # torch's AdamW is one that DeepSpeed does not know by name.
        "zero_allow_untested_optimizer": True,
    }
