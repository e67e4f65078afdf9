"""What ranks do in the tests of checkpoints saved by many. Free of pytest: ranks import it when they start."""

import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter, filesystem

from tests.checkpoints import load_state
from tests.training.layouts import CARRIED, LAYOUTS, PARTS, blank, canonical, differences, held, origin
from wemmu.checkpoint import manifest as manifest_module
from wemmu.checkpoint import retention, store
from wemmu.checkpoint.collective import CheckpointError
from wemmu.checkpoint.manifest import FORMAT, Manifest, Origin, sha256_of
from wemmu.checkpoint.saver import Saver
from wemmu.checkpoint.sharded_tensor import ShardedTensor
from wemmu.config import StageRun
from wemmu.locks import EXCLUSIVE, take
from wemmu.training import hold, resume

STEP = 4


def save_all(rank: int, world: int, root: Path) -> None:
    for name, layout in LAYOUTS.items():
        state = held(canonical(STEP), layout, rank, world)
        store.save(root / f"{name}-{world}", state, CARRIED, origin(name))


def refusals(rank: int, world: int, root: Path) -> dict[str, str]:
    """What is said on this rank when a save or a load must be refused."""
    directory = store.save(root / "good", held(canonical(STEP), LAYOUTS["zero3"], rank, world), {}, origin())
    said = {}

    def try_(case: str, act: Callable[[], object]) -> None:
        try:
            act()
        except CheckpointError as error:
            said[case] = str(error)

    def fresh():
        return held(canonical(STEP), LAYOUTS["zero3"], rank, world)

    more, fewer, odd = fresh(), fresh(), fresh()
    if rank == 1:
        for part in (more.weights, more.exp_avg, more.exp_avg_sq, more.ema):
            part["bridge.more"] = torch.zeros(2)
        odd.weights["dit.to_out.bias"] = torch.zeros(8)
    for part in (fewer.weights, fewer.exp_avg, fewer.exp_avg_sq, fewer.ema):
        del part["dit.to_out.bias"]
    try_("lacks", lambda: load_state(directory, more))
    try_("unknown", lambda: load_state(directory, fewer))
    try_("shape", lambda: load_state(directory, odd))

    hole = fresh()
    if rank == 1:
        hole.exp_avg["dit.qk.weight"] = ShardedTensor((6, 5), [])
    try_("hole", lambda: store.save(root / "bad", hole, {}, origin()))
    try_("steps", lambda: store.save(root / "bad", replace(fresh(), steps=rank), {}, origin()))
    infinite = fresh()
    if rank == 1:
        infinite.exp_avg_sq["dit.qk.weight"].parts[0][1].fill_(float("inf"))
    try_("infinite", lambda: store.save(root / "bad", infinite, {}, origin()))
    try_("busy", lambda: _busy(rank, root))
    try_("full disk", lambda: _with_a_full_disk_on(1, lambda: store.save(root / "bad", fresh(), {}, origin())))
    # Nothing of this is in the way of the next.
    store.save(root / "bad", fresh(), {}, origin())
    return said


def _busy(rank: int, root: Path) -> None:
    """Hold a folder that only the first rank's machine knows to be held."""
    with ExitStack() as stack:
        if rank == 0:
            file = stack.enter_context((root / hold.FILE).open("a+"))
            file.write('{"pid": 1, "host": "another"}')
            file.flush()
            take(file.fileno(), EXCLUSIVE, root)
        with hold.held(root):
            pass


def _with_a_full_disk_on(victim: int, act: Callable[[], object]) -> None:
    """No file may be longer than a few bytes; the error is another one than of a full disk, but as real."""
    if dist.get_rank() == victim:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        act()
    finally:
        if dist.get_rank() == victim:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def load_damaged(rank: int, world: int, roots: list[Path]) -> list[str]:
    """What is said on this rank of each damaged checkpoint."""
    said = []
    for root in roots:
        try:
            load_state(root / store.directory_name(STEP), canonical(0))
            said.append("")
        except CheckpointError as error:
            said.append(str(error))
    return said


def load_newest_whole(rank: int, world: int, root: Path) -> tuple[int, list[str], list[Path]]:
    """The step that was loaded, the tensors that differ from it, and the files that this rank hashed."""
    hashed: list[Path] = []
    manifest_module.sha256_of = lambda file: hashed.append(file) or sha256_of(file)
    state = canonical(0)
    manifest = store.load_newest(root, state)
    assert manifest is not None
    return manifest.step, differences(state, canonical(manifest.step)), hashed


def save_while_training(rank: int, world: int, root: Path) -> dict[str, object]:
    """Saves of a state that changes at once, beside collectives of the training, with a slow disk."""
    slow, real = threading.Event(), FileSystemWriter.write_data

    def write_data(self, *arguments):
        slow.wait()
        return real(self, *arguments)

    FileSystemWriter.write_data = write_data
    sum_ = torch.zeros(())
    live = held(canonical(0), LAYOUTS["zero3"], rank, world)
    saver = Saver(root, 2, origin())
    seen: list[list[str]] = []
    for step in range(1, 5):
        now = held(canonical(step), LAYOUTS["zero3"], rank, world)
        for part in PARTS:
            for name, tensor in getattr(live, part).items():
                for (_, view), (_, new) in zip(tensor.parts, getattr(now, part)[name].parts, strict=True):
                    view.copy_(new)
        saver.save(replace(live, steps=step), CARRIED)
        blank(live)
        # The disk is stuck, the training goes on.
        for _ in range(20):
            x = torch.ones(())
            dist.all_reduce(x)
            sum_ += x
        # A rank that is told to begin by the other may not have begun yet.
        seen.append(sorted(d.name for d in root.glob("step_*") if d.suffix != ".tmp"))
        slow.set()
        if step < 4:
            saver.wait()
            slow.clear()
    saver.close()
    return {"sum": float(sum_), "seen": seen, "left": sorted(d.name for d in root.iterdir())}


def fail_in_the_background(rank: int, world: int, root: Path) -> list[str]:
    """What the calls after a save that fails on rank 1 say."""
    saver = Saver(root, 2, origin())
    state = held(canonical(1), LAYOUTS["fsdp"], rank, world)
    said = []

    def begin_and_wait() -> None:
        saver.save(state, CARRIED)
        saver.wait()

    try:
        _with_a_full_disk_on(1, begin_and_wait)
    except CheckpointError as error:
        said.append(str(error))
    saver.save(state, CARRIED)
    saver.close()
    return said


# Where a process is killed: what it is about to do, or has just done, in saving step 2.
POINTS: dict[str, tuple[object, str, str]] = {
    "nothing is written yet": (store, "write", "before"),
    "the plan is made": (FileSystemWriter, "write_data", "before"),
    "half of the tensors are written": (filesystem, "_write_item", "tenth"),
    "all tensors are written": (FileSystemWriter, "write_data", "after"),
    "files are being hashed": (store, "sha256_of", "before"),
    "the manifest is about to be written": (store, "write_manifest", "before"),
    "the manifest is written": (store, "write_manifest", "after"),
    "the name is given": (store, "sync", "third"),
    "an older one is about to go": (retention, "_remove", "before"),
    "an older one is half removed": (retention.shutil, "rmtree", "half"),
}


def killed(rank: int, world: int, root: Path, point: str, victim: int | None) -> None:
    """Save step 1 whole, then step 2, in which `victim` (None: every rank that comes there) dies at `point`."""
    writes = Saver(root, 1, origin())
    layout = LAYOUTS["zero3"]
    writes.save(held(canonical(1), layout, rank, world), CARRIED)
    writes.wait()
    dist.barrier()
    if victim in (None, rank):
        _die_at(*POINTS[point])
    writes.save(held(canonical(2), layout, rank, world), CARRIED)
    writes.close()


def _die_at(place: object, name: str, when: str) -> None:
    real, calls = getattr(place, name), 0

    def dying(*arguments, **named):
        nonlocal calls
        calls += 1
        if when == "half":
            directory = Path(arguments[0])
            if not directory.exists():
                return
            next(directory.rglob("*.distcp")).unlink()
        if when in ("before", "half") or calls == {"third": 3, "tenth": 10}.get(when):
            _die()
        result = real(*arguments, **named)
        if when == "after":
            _die()
        return result

    setattr(place, name, dying)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def save_until_killed(rank: int, world: int, root: Path, saves: float) -> None:
    """Go on from what is there and save step after step; die after one save and the time of `saves` more."""
    state = held(canonical(0), LAYOUTS["fsdp"], rank, world)
    writes = Saver(root, 2, origin())
    manifest = store.load_newest(root, state)
    step = manifest.step if manifest else 0
    assert differences(state, canonical(step)) == []
    begun = time.monotonic()
    while True:
        step += 1
        writes.save(held(canonical(step), LAYOUTS["fsdp"], rank, world), CARRIED)
        if begun is not None:
            writes.wait()
            threading.Timer(saves * (time.monotonic() - begun), _die).start()
            begun = None


def resume_beside_another_vlm(rank: int, world: int, run: StageRun) -> str:
    """Only the second rank's disk has other weights; returns what this rank is told."""
    was = Origin(run.stage.name, run.seed, run.stage.resolution, {"vlm": "a" * 64})
    manifest = Manifest(format=FORMAT, step=2, tensors={}, trained=[], files={}, libraries={}, **vars(was))
    here = replace(was, frozen={"vlm": "b" * 64 if rank == 1 else "a" * 64})
    try:
        resume.check(Path("step_00000002"), manifest, here, run)
    except CheckpointError as error:
        return str(error)
    return "resumed"
