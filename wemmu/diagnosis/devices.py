"""Checks the GPUs and the kernels that training uses."""

import importlib
import importlib.metadata as metadata
import shutil

from wemmu.diagnosis.commands import answer
from wemmu.diagnosis.findings import Call, Finding, short
from wemmu.readable import human

# Seconds; nvidia-smi is slow while the driver sleeps.
_SMI_TIMEOUT = 20.0


def calls() -> list[Call]:
    return [(gpus,), (bfloat16,), (apex,), (fused_adamw,), (attention,), (flash_attn,)]


def gpus() -> Finding:
    import torch

    count, built = torch.cuda.device_count(), torch.version.cuda or torch.version.hip
    driver = _driver()
    if torch.cuda.is_available() and count:
        kinds = [torch.cuda.get_device_properties(i) for i in range(count)]
        each = ", ".join(f"{kind.name} with {human(kind.total_memory, 'B')}" for kind in kinds)
        return Finding("GPUs", "ok", f"{count}: {each}; driver {driver or 'unknown'}, torch is built for CUDA {built}")
    if driver is None:
        return Finding("GPUs", "warning", "none: training runs on the CPU", "a GPU, for more than the miniature")
    if built is None:
        remedy = "install a build of torch with CUDA, and torchvision with it"
        return Finding("GPUs", "problem", f"driver {driver}, but this torch is a CPU build", remedy)
    remedy = (
        f"look at CUDA_VISIBLE_DEVICES, and whether driver {driver} is new enough for CUDA {built} (`nvidia-smi` names "
        "the newest that it serves); a newer driver, or a torch built for an older CUDA"
    )
    return Finding("GPUs", "problem", f"driver {driver}, but torch (CUDA {built}) cannot use any GPU", remedy)


def _driver() -> str | None:
    """Return the driver version of the first GPU that nvidia-smi lists; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        code, output = answer(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], _SMI_TIMEOUT)
    except TimeoutError:
        return "that does not answer"
    lines = output.splitlines()
    return lines[0] if code == 0 and lines else None


def bfloat16() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("bfloat16", "ok", "on the CPU, slow; float32 is as fast there")
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Finding("bfloat16", "ok", "in the GPU's hardware")
    remedy = "backbones.dtype: float32, or a GPU of Ampere or later"
    return Finding("bfloat16", "warning", "not in this GPU's hardware", remedy)


def apex() -> Finding:
    """Check for NVIDIA's Apex, or the other project with its name on the package index."""
    from wemmu.kernels import find_apex

    installed, problem = find_apex()
    if installed:
        return Finding("NVIDIA Apex", "ok", "installed, and loads")
    if problem is None:
        return Finding("NVIDIA Apex", "ok", "not installed, not needed: torch's own fused kernels are used")
    remedy = (
        "uninstall it (`pip uninstall apex`), or build NVIDIA's from its repository against this torch; it is not "
        "needed: torch's own fused kernels serve"
    )
    return Finding("NVIDIA Apex", "problem", short(problem), remedy)


def fused_adamw() -> Finding:
    """Run one step of AdamW on the device that training would use."""
    import torch

    name = "torch's fused AdamW"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weight = torch.nn.Parameter(torch.ones(4, device=device))
    weight.grad = torch.ones_like(weight)
    try:
        torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0, fused=True).step()
    except Exception as error:
        remedy = f"training needs it; reinstall torch for this {device.type}"
        return Finding(name, "problem", f"fails on the {device.type}: {short(error)}", remedy)
    # The first step of Adam is the learning rate.
    if not torch.allclose(weight.detach().cpu(), torch.full((4,), 0.9), atol=1e-4):
        return Finding(name, "problem", f"steps wrongly on the {device.type}: {weight.tolist()}", "reinstall torch")
    return Finding(name, "ok", f"works on the {device.type}; all engines use it")


def attention() -> Finding:
    """Check which kernels of scaled_dot_product_attention run; padded prompts need one with a mask."""
    import torch

    from wemmu.kernels import attention_kernels

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool, device=device)
    without, with_mask = (attention_kernels(torch.device(device), dtype, each) for each in (None, mask))
    found = f"on the {device}: {', '.join(without)}; with a mask: {', '.join(with_mask)}"
    if not with_mask:
        return Finding("attention kernels", "problem", found, "reinstall torch for this device")
    if set(with_mask) == {"math"} and device == "cuda":
        remedy = "a GPU and a torch whose memory-efficient or cuDNN attention runs: plain attention keeps n x n scores"
        return Finding("attention kernels", "warning", found, remedy)
    return Finding("attention kernels", "ok", found)


def flash_attn() -> Finding:
    try:
        version = metadata.version("flash-attn")
    except metadata.PackageNotFoundError:
        return Finding("flash-attn", "ok", "not installed, not needed: torch's attention is used")
    try:
        importlib.import_module("flash_attn")
    except Exception as error:
        remedy = "build it against this torch, or uninstall it: torch's attention is used anyway"
        return Finding("flash-attn", "warning", f"{version} does not load: {short(error)}", remedy)
    return Finding("flash-attn", "ok", f"{version} loads; not needed: torch's attention is used")
