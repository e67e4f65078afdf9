"""Checks memory, disks, limits and the clock of this machine."""

import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

from wemmu.config.files import nearest
from wemmu.diagnosis.findings import Call, Finding
from wemmu.locks import EXCLUSIVE, LockedError, take
from wemmu.readable import human

# Bytes; loader processes, NCCL and Ray exchange tensors there. Docker's default is 64 MB.
SHARED_MEMORY = 1e9
# Open files: a reader of many streams, Ray and DeepSpeed each keep hundreds.
OPEN_FILES = 4096
# Seconds: a shared file system with another clock makes "newer than" wrong.
SKEW_S = 2.0
# Bytes of a run of the miniature, with room to work.
DISK = 10e9


def calls(run: Path) -> list[Call]:
    return [(memory,), (shared_memory,), (cores,), (open_files,), (clock, run), (file_locks, run), (disk_here, run)]


def existing(path: Path) -> Path:
    """Return `path`, or its nearest existing parent: the file system on which it would be created."""
    place = nearest(path)
    return place if place.is_dir() else place.absolute().parent


def host_bytes() -> float:
    """Return the memory of this machine, or of the container if that has less."""
    limits = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(file).read_text(encoding="utf-8").strip() if Path(file).is_file() else ""
        limits += [float(text)] if text.isdigit() else []
    return min(limits)


def core_count() -> int:
    """Return the number of cores of this process, or of the container's quota."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text(encoding="utf-8").split()
        if limit.isdigit():
            cores = min(cores, max(1, round(int(limit) / int(period))))
    return cores


def memory() -> Finding:
    total = host_bytes()
    if total < 8e9:
        remedy = "the miniature needs about 4 GB; `wemmu plan` computes it for other curricula"
        return Finding("host memory", "warning", human(total, "B"), remedy)
    return Finding("host memory", "ok", human(total, "B"))


def shared_memory(folder: Path = Path("/dev/shm"), least: float = SHARED_MEMORY) -> Finding:
    if not folder.is_dir():
        return Finding(str(folder), "ok", "not here: this system shares memory otherwise")
    total, _, free = shutil.disk_usage(folder)
    found = f"{human(total, 'B')}, {human(free, 'B')} free"
    if total < least:
        remedy = f"at least {human(least, 'B')}: start the container with --shm-size=8g, or mount it larger"
        return Finding(str(folder), "problem", found, remedy)
    if free < least:
        remedy = f"at least {human(least, 'B')} free: remove what dead processes have left in {folder}"
        return Finding(str(folder), "problem", found, remedy)
    return Finding(str(folder), "ok", found)


def cores() -> Finding:
    here, said = core_count(), os.environ.get("OMP_NUM_THREADS")
    if said is None:
        return Finding("cores", "ok", f"{here}; OMP_NUM_THREADS is not set, so every process uses all of them")
    found = f"{here}, OMP_NUM_THREADS={said}"
    if not said.isdigit() or not 1 <= int(said) <= here:
        remedy = f"OMP_NUM_THREADS from 1 to {here}: cores / ranks on this machine"
        return Finding("cores", "warning", found, remedy)
    return Finding("cores", "ok", found)


def open_files(least: int = OPEN_FILES) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= least:
        return Finding("open files", "ok", "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft}")
    raised = f"`ulimit -n {least}`" if hard == resource.RLIM_INFINITY or hard >= least else "an administrator"
    remedy = f"at least {least}: {raised} raises it (in the job script, on a cluster)"
    return Finding("open files", "warning", f"at most {soft}", remedy)


def clock(run: Path, tolerance_s: float = SKEW_S) -> Finding:
    """Compare the file date of the run folder's file system with this machine's clock."""
    folder = existing(run)
    before = time.time()
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            file.write(b"what time is it?")
            file.flush()
            os.fsync(file.fileno())
            dated, after = os.stat(file.name).st_mtime, time.time()
    except OSError as error:
        remedy = "a run folder that this user may write to: --run"
        return Finding("run folder", "problem", f"nothing can be written in {folder}: {error}", remedy)
    skew = max(before - dated, dated - after, 0.0)
    if skew > tolerance_s:
        remedy = "synchronise both machines with the same server (chrony, NTP)"
        return Finding("clock", "warning", f"{skew:.1f} s apart from the file system of {folder}", remedy)
    return Finding("clock", "ok", f"agrees with the file system of {folder}")


def file_locks(run: Path) -> Finding:
    """Check whether the run folder's file system has the locks that launchers and trainers need."""
    folder = existing(run)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            take(file.fileno(), EXCLUSIVE, folder)
    except LockedError as error:
        found, _, remedy = str(error).partition(". ")
        return Finding("file locks", "problem", found, remedy)
    except OSError as error:
        return Finding("file locks", "warning", f"not tried: {error}", "see the line of the run folder")
    return Finding("file locks", "ok", f"work at {folder.absolute()}")


def disk_here(run: Path, least: float = DISK) -> Finding:
    folder = existing(run)
    free = shutil.disk_usage(folder).free
    found = f"{human(free, 'B')} free at {folder.absolute()}"
    if free < least:
        return Finding("disk", "warning", found, f"{human(least, 'B')} for the miniature; more for anything else")
    return Finding("disk", "ok", found)
