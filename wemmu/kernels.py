"""Chooses the kernels of training: probes them on the device, compares them with the plain ones, reports the choice.

A fused kernel is never required. It is used only if it agrees with the plain one on this device within the bounds
below; otherwise it is rejected with a reason. `pip install apex` is not NVIDIA's Apex, which is known by its parts.
"""

import importlib
import importlib.util
import os
import shutil
import socket
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wemmu.config.schema import Kernels as KernelsConfig
from wemmu.noise import on_device

# The largest difference from the plain kernel, relative to the norm of its result. For an optimizer the result is the
# movement of weights, a hundredth of their size in three steps, so rounding alone is 1e-5. Plain norms round to
# bfloat16 before they multiply with the weight, fused ones after it: two roundings of 2^-9 each.
ADAMW_BOUND = 1e-4
NORM_BOUND = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
COMPILE_BOUND = 1e-5

ATTENTION = {
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient",
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.MATH: "math",
}
# Sizes of cuBLAS's workspace with which it sums in one order.
CUBLAS_VARIABLE, CUBLAS_WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
# Characters of an error that the choice of a kernel shows.
WORDS = 300
APEX_PARTS = ("normalization", "optimizers")
NO_APEX = "Apex is not installed"

# What a rank says -> what all ranks say, in their order. Every rank calls it, as often as the others.
Gather = Callable[[Any], list[Any]]
# (x [..., D], weight [D], eps) -> x / rms(x) * weight.
Norm = Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Kernels:
    """The choice. attention, masked_attention: without and with a mask; noise: where it is drawn, `host` or `device`.

    narrow: see `wemmu.backbones.linear_attention`; refused: rejected kernels with reasons.
    """

    adamw: str
    norms: str
    attention: str
    masked_attention: str
    compiled: bool
    noise: str = "host"
    deterministic: bool = False
    narrow: bool = False
    channels_last: bool = False
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        compiled = ", layers compiled (the first step of each shape takes longer)" if self.compiled else ""
        chosen = (
            f"AdamW {self.adamw}, norms {self.norms}, attention {self.attention} ({self.masked_attention} where "
            f"prompts are padded), noise drawn on the {self.noise}{compiled}"
        )
        if self.narrow:
            chosen += ", linear attention not in float32"
        if self.channels_last:
            chosen += ", the frozen autoencoder in channels_last"
        if self.deterministic:
            chosen += ", deterministic: every sum in one order, cuDNN's attention not used; on a GPU this is slower"
        return "; ".join([chosen, *self.refused])


def fast(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether fields that are `auto` are on: where it was measured to help."""
    return device.type == "cuda" and dtype == torch.bfloat16


def choose(
    config: KernelsConfig,
    engine: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    gather: Gather = lambda own: [own],
) -> Kernels:
    """Probe the kernels and choose, for all ranks alike: a kernel is taken where every rank can take it.

    Ranks that compile gather the weights of a layer in one go, so they would wait forever for one that does not.

    Raises:
        ValueError: on all ranks, if layers are to be compiled and torch.compile does not work on one of them.
    """
    refused: list[str] = []

    def of_all(why: str | None) -> str | None:
        return first_objection(gather((socket.gethostname(), why)))

    auto = fast(device, dtype)
    compiled = config.compile if config.compile != "auto" else auto
    if compiled and (why := of_all(no_compiling(device))):
        if config.compile is True:
            raise ValueError(f"kernels.compile: {why}; or leave the field out")
        compiled = False
        refused.append(f"layers are not compiled, which costs a fifth of the speed: {why}")
    installed, problem = find_apex()
    # Where nobody has it, nobody misses it.
    tell = any(gather(installed or problem is not None))
    without_apex = of_all(None if installed else problem or NO_APEX)
    apex = without_apex is None
    if tell and without_apex:
        refused.append(without_apex)

    def agrees(what: str, difference: Callable[[], float], bound: float) -> bool:
        if why := of_all(objection(difference, bound)):
            refused.append(f"{what} is not taken: {why}")
        return not why

    # DeepSpeed's sharded engine reads the step's number where torch's AdamW keeps it.
    may_adam = apex and engine != "zero3"
    fused = may_adam and agrees("Apex's FusedAdam", lambda: adamw_difference(fused_adam(), device), ADAMW_BOUND)
    norms = "plain"
    if auto if config.fused_norms == "auto" else config.fused_norms:
        for name, norm in norm_kernels(apex).items():
            if agrees(f"{name}'s norm", partial(norm_difference, norm, device, dtype), NORM_BOUND[dtype]):
                norms = name
                break
    # Of each rank's own samples: reported, where ranks differ every one.
    without, masked = (
        " or ".join(dict.fromkeys(gather(attention_taken(device, dtype, head_dim, mask)))) for mask in (False, True)
    )
    noise = "device" if on_device(config.noise, device) else "host"
    adamw = "Apex" if fused else "torch"
    narrow = auto if config.narrow_attention == "auto" else config.narrow_attention
    return Kernels(
        adamw, norms, without, masked, compiled, noise, config.deterministic, narrow, config.channels_last,
        tuple(refused),
    )  # fmt: skip


def first_objection(answers: Sequence[tuple[str, str | None]]) -> str | None:
    """Return why the first rank that cannot take a kernel cannot, and of several ranks which it is; None if all can.

    answers: of each rank its machine and why it cannot.
    """
    cannot = [(rank, host, why) for rank, (host, why) in enumerate(answers) if why]
    if not cannot:
        return None
    rank, host, why = cannot[0]
    if len(answers) == 1:
        return why
    return f"rank {rank} on {host}{f' (and {len(cannot) - 1} more)' if cannot[1:] else ''}: {why}"


def make_deterministic() -> None:
    """Let every operation of this process compute the same bits each time, or fail with its name.

    Call it before anything runs on the GPU.

    Raises:
        ValueError: if the environment sets a workspace for cuBLAS with which it sums in any order.
    """
    workspace = os.environ.setdefault(CUBLAS_VARIABLE, CUBLAS_WORKSPACES[0])
    if workspace not in CUBLAS_WORKSPACES:
        raise ValueError(
            f"kernels.deterministic: the environment sets {CUBLAS_VARIABLE}={workspace}, with which cuBLAS sums in any "
            f"order; unset it, or use one of {', '.join(CUBLAS_WORKSPACES)}"
        )
    from torch._inductor import config as inductor

    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory before it writes it, so filling it would only cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    # It adds gradients up in any order. The flash and the memory-efficient kernel follow torch's switch.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Else it chooses kernels by time, which the next process may measure otherwise.
    inductor.deterministic = True


def objection(difference: Callable[[], float], bound: float) -> str | None:
    """Return why a kernel is rejected, None if it is used; `difference` measures its distance from the plain one."""
    try:
        off = difference()
    except Exception as error:
        return f"it fails on this device ({type(error).__name__}: {' '.join(str(error).split())[:WORDS]})"
    # Not `off > bound`, which a NaN would pass.
    return None if off <= bound else f"it is {off:.1e} off the plain one on this device, more than {bound:.1e}"


def apply(
    kernels: Kernels, norm_class: type[nn.Module], parts: Iterable[nn.Module], layers: Iterable[nn.Module]
) -> None:
    """Give the norms of `norm_class` (`weight`, `variance_epsilon`) in `parts` their kernel, and compile each layer."""
    if kernels.norms != "plain":
        norm = norm_kernels(apex=kernels.norms == "Apex")[kernels.norms]
        for part in parts:
            for module in part.modules():
                if type(module) is norm_class:
                    module.forward = partial(_fused, module, norm)
    if kernels.compiled:
        for layer in layers:
            # In place, so that parameters keep their names; the hooks of sharded engines stay outside of the graph.
            layer.forward = torch.compile(layer.forward)


def _fused(module: Any, norm: Norm, x: Tensor) -> Tensor:
    return norm(x, module.weight, module.variance_epsilon)


def torch_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute the norm as Hugging Face's layers do: in float32, rounded before the product with the weight."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def norm_kernels(apex: bool) -> dict[str, Norm]:
    """Return the norms by name, best first."""
    found: dict[str, Norm] = {"torch": torch_norm}
    if apex:
        fused = importlib.import_module("apex.normalization.fused_layer_norm").fused_rms_norm_affine
        found = {"Apex": lambda x, weight, eps: fused(x, weight, (x.shape[-1],), eps)} | found
    return found


def norm_difference(norm: Norm, device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest relative distance of `norm` from the plain one, forward and in both gradients."""
    generator = torch.Generator().manual_seed(0)
    x, weight, gradient = (
        torch.randn(shape, generator=generator).to(device, dtype) for shape in ((64, 256), (256,), (64, 256))
    )
    found = []
    for each in (norm, plain_norm):
        leaves = x.clone().requires_grad_(), (1 + 0.1 * weight).requires_grad_()
        y = each(*leaves, 1e-6)
        found.append([y, *torch.autograd.grad(y, leaves, gradient)])
    return max(_off(one, plain) for one, plain in zip(*found, strict=True))


def fused_adam() -> Callable[..., torch.optim.Optimizer]:
    """Return NVIDIA Apex's FusedAdam; `wemmu.parallel.adamw` handles its own options and step count."""
    return importlib.import_module("apex.optimizers").FusedAdam


def adamw_difference(fused: Callable[..., torch.optim.Optimizer], device: torch.device) -> float:
    """Return the distance of weights from torch's AdamW after three steps with decay and a changing rate."""
    generator = torch.Generator().manual_seed(0)
    first, *gradients = (torch.randn(1000, generator=generator).to(device) for _ in range(4))
    found = []
    for cls in (fused, torch.optim.AdamW):
        weight = nn.Parameter(first.clone())
        optimizer = cls([weight], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        for number, gradient in enumerate(gradients):
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + number)
            weight.grad = gradient.clone()
            optimizer.step()
        found.append(weight.detach() - first)
    return _off(*found)


def _off(one: Tensor, plain: Tensor) -> float:
    return float((one.detach().float() - plain.detach().float()).norm() / plain.detach().float().norm())


def find_apex() -> tuple[bool, str | None]:
    """Return whether NVIDIA's Apex is installed and loads; if a package of that name does not work, also why."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return False, None
    places = list(spec.submodule_search_locations or ())
    if not any((Path(place) / part).exists() for place in places for part in APEX_PARTS):
        return False, f"the package apex in {', '.join(places) or spec.origin} is another project of that name"
    try:
        for part in APEX_PARTS:
            importlib.import_module(f"apex.{part}")
    except Exception as error:
        return False, f"Apex is installed, but does not load: {type(error).__name__}: {error}"
    return True, None


def attention_taken(device: torch.device, dtype: torch.dtype, head_dim: int, masked: bool) -> str:
    """Return the kernel that torch chooses for the pathway's attention, 64 tokens that attend to 128."""
    q, k = (torch.empty(1, 2, n, head_dim, device=device, dtype=dtype) for n in (64, 128))
    mask = torch.zeros(1, 1, 64, 128, device=device, dtype=dtype) if masked else None
    return ATTENTION[SDPBackend(torch._fused_sdp_choice(q, k, k, mask))]


def attention_kernels(device: torch.device, dtype: torch.dtype, mask: Tensor | None) -> list[str]:
    """Return the kernels of scaled_dot_product_attention that run; `mask` is [1, 1, 64, 64] or None."""
    q = torch.ones(1, 2, 64, 64, device=device, dtype=dtype)
    found = []
    for kernel, name in ATTENTION.items():
        # A kernel that is not there says why in warnings and then in an error.
        with warnings.catch_warnings(), sdpa_kernel(kernel):
            warnings.simplefilter("ignore")
            try:
                F.scaled_dot_product_attention(q, q, q, mask)
            except RuntimeError:
                continue
        found.append(name)
    return found


def no_compiling(device: torch.device) -> str | None:
    """Return why torch.compile does not work here, and the remedy; None if it does.

    On a GPU it also needs a C compiler and Python's headers, which a machine with a C++ compiler may lack, and it would
    say so in the first step only.
    """
    if compiler() is None:
        return "there is no C++ compiler; install one or name it in CXX"
    why = objection(lambda: compile_difference(device), COMPILE_BOUND)
    return why and f"torch.compile does not work: {why}; it needs a C and a C++ compiler and Python's headers"


@torch.no_grad()
def compile_difference(device: torch.device) -> float:
    """How far a compiled function, an elementwise one and a sum, is off the plain one."""

    def function(x: Tensor) -> Tensor:
        return (x * x.sigmoid()).sum(-1)

    if device.type == "cuda":
        from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

        # torch sets it as well, but later than Triton first writes: into the home, which may be read-only.
        os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(device.index or 0))
    x = torch.linspace(-3, 3, 64 * 64, device=device).reshape(64, 64)
    return _off(torch.compile(function)(x), function(x))


def compiler() -> str | None:
    """Return the C++ compiler that torch.compile would find."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
