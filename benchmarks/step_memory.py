"""The most memory that a process needs for something: resident on the CPU, allocated by torch on a GPU."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measure import peak_mb


@dataclass
class Memory:
    """In MB. before: held when it began; peak: the most there was from then on."""

    before: float = 0.0
    peak: float = 0.0


@contextmanager
def watch(device: torch.device) -> Iterator[Memory]:
    """Memory of what is done inside; filled in at the end."""
    memory = Memory()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        memory.before = torch.cuda.memory_allocated(device) / 2**20
        yield memory
        memory.peak = torch.cuda.max_memory_allocated(device) / 2**20
        return
    # Memory that was freed but not given back would hide what is allocated anew.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    # Sets the peak of this process to what is resident now (man 5 proc).
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    memory.before = peak_mb()
    yield memory
    memory.peak = peak_mb()
