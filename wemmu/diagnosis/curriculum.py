"""Whether this machine can train a curriculum: its GPUs, memory and cores."""

from pathlib import Path

from wemmu.config import Curriculum
from wemmu.diagnosis import preflight
from wemmu.diagnosis.findings import Call, Finding
from wemmu.diagnosis.host import core_count, host_bytes
from wemmu.diagnosis.preflight import MEMORY, not_told, plan_of
from wemmu.readable import human


def calls(curriculum: Curriculum, run: Path) -> list[Call]:
    here = (gpus_here, ranks_and_cores, gpu_memory, host_memory)
    return [*preflight.calls(curriculum, run), *((check, curriculum) for check in here)]


def gpus_here(curriculum: Curriculum) -> Finding:
    ranks, here = curriculum.parallel.ranks, _gpu_count()
    if here and ranks > here:
        remedy = f"as many nodes as hold {ranks} GPUs (Slurm), or parallel.ranks up to {here}"
        return Finding("GPUs of the ranks", "warning", f"ranks {ranks}, GPUs here {here}", remedy)
    return Finding("GPUs of the ranks", "ok", f"ranks {ranks}, GPUs here {here}")


def ranks_and_cores(curriculum: Curriculum) -> Finding:
    import torch

    ranks, cores = _ranks_here(curriculum), core_count()
    threads = curriculum.threads or torch.get_num_threads()
    found = f"ranks here {ranks}, threads of each {threads}, cores {cores}"
    if ranks * threads > cores:
        remedy = f"threads: {max(1, cores // ranks)} in the curriculum; more make each other wait"
        return Finding("threads of the ranks", "warning", found, remedy)
    return Finding("threads of the ranks", "ok", found)


def gpu_memory(curriculum: Curriculum) -> Finding:
    import torch

    name, planned = "GPU memory of the plan", plan_of(curriculum)
    if planned is None:
        return not_told(name)
    peaks = planned.peaks
    worst = max(peaks, key=lambda stage: peaks[stage])
    found = f"{human(peaks[worst], 'B')} at most (stage {worst})"
    if not torch.cuda.is_available():
        return Finding(name, "ok", f"{found}; no GPU here to compare with")
    room = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    found = f"{found}, {human(room, 'B')} here"
    if peaks[worst] > room:
        return Finding(name, "problem", found, MEMORY)
    return Finding(name, "ok", found)


def host_memory(curriculum: Curriculum) -> Finding:
    import torch

    name, planned = "host memory of the plan", plan_of(curriculum)
    if planned is None:
        return not_told(name)
    ranks, gpu, room = _ranks_here(curriculum), torch.cuda.is_available(), host_bytes()
    # Without a GPU, what would be on it is in host memory, too.
    totals = {stage.name: stage.host_total + (0 if gpu else planned.peaks[stage.name]) for stage in planned.stages}
    worst = max(totals, key=lambda stage: totals[stage])
    found = f"{ranks} x {human(totals[worst], 'B')} at most (stage {worst}), {human(room, 'B')} here"
    if ranks * totals[worst] <= room:
        return Finding(name, "ok", found)
    remedy = "memory.cached_images, data.workers or memory.micro_batch smaller, or a machine with more"
    # A login node need not hold what the nodes with GPUs will.
    return Finding(name, "problem" if gpu else "warning", found, remedy)


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _ranks_here(curriculum: Curriculum) -> int:
    """Ranks of a run that this machine would have: one for each GPU at most."""
    return min(curriculum.parallel.ranks, _gpu_count() or curriculum.parallel.ranks)
