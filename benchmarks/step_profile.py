"""Where the time of one training step goes, by kind of operation."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

# The first that is part of an operation's name tells its kind; what is none of these is "elementwise and norms".
KINDS = {
    "optimizer": ("adam", "_foreach_"),
    "attention": ("scaled_dot_product", "_flash_attention", "_efficient_attention"),
    "convolution": ("conv",),
    "matrix product": ("aten::mm", "addmm", "bmm", "aten::linear", "aten::matmul"),
    "random numbers": ("normal_", "randn", "rand"),
    "copies and casts": (
        "copy_",
        "aten::cat",
        "_to_copy",
        "clone",
        "index",
        "gather",
        "stack",
        "masked_scatter",
        "fill_",
    ),
}
REST = "elementwise and norms"


def kind_of(operation: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in operation for part in parts)), REST)


def shares(step: Callable[[], None], device: torch.device, trace: Path | None = None) -> dict[str, float]:
    """Kind -> its share of the time that the device spends in operations during `step`; largest first.

    trace: where the profiler's timeline goes, for chrome://tracing.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        step()
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    spent: dict[str, float] = {}
    for event in profiler.key_averages():
        # On a GPU kernels have entries of their own besides those of the operations that launched them.
        if event.key.startswith("aten::"):
            kind, time = kind_of(event.key), event.self_device_time_total if on_gpu else event.self_cpu_time_total
            spent[kind] = spent.get(kind, 0.0) + time
    total = sum(spent.values())
    return {kind: time / total for kind, time in sorted(spent.items(), key=lambda item: -item[1])}
