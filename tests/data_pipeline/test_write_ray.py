"""With real Ray: the same bytes as without, and kill -9 of the writing process amid its partitions."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_pipeline.cluster import RayError, ray_cluster, workers
from data_pipeline.records import SourcePartition, WorkerError
from tests.data_pipeline.test_faults import contents
from tests.data_pipeline.worlds import SHAPES, collection, curriculum_of, write_in_process
from tests.patience import eventually
from wemmu.command_line import FAILED, exit_code
from wemmu.config import Curriculum, dump


@contextmanager
def ray_run(curriculum: Curriculum, file: Path) -> Iterator[subprocess.Popen]:
    """A writing process; whatever it leaves behind is ended with it."""
    dump(curriculum, file)
    # The mark finds the processes that Ray starts, which leave the group and the session of their parent.
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    process = subprocess.Popen(
        [sys.executable, "-m", "data_pipeline", "write", str(file), "--workers", "1"],
        env={**os.environ, "WEMMU_TEST_RUN": mark},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                if f"WEMMU_TEST_RUN={mark}".encode() in (directory / "environ").read_bytes():
                    os.kill(int(directory.name), signal.SIGKILL)
            except OSError:
                continue
        for scratch in Path("/tmp").glob(f"ray{process.pid}-*"):
            shutil.rmtree(scratch, ignore_errors=True)


@pytest.mark.slow
def test_a_killed_run_is_finished_by_the_next(tmp_path: Path) -> None:
    sources = [*collection(tmp_path / "source"), SHAPES | {"samples": {"t2i": 1500, "edit": 1000}}]
    partitions = {"partition": 25}
    root = tmp_path / "killed"

    def finished() -> int:
        return len(list((root / "ledger").glob("[0-9]*.json")))

    with ray_run(curriculum_of(root, sources, **partitions), tmp_path / "curriculum.yaml") as process:
        eventually(lambda: finished() >= 5 or process.poll() is not None, seconds=900, every=0.002)
        assert process.poll() is None, "the run ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        assert finished() < 100
        # Right away, while workers of the killed run may still be writing.
        with ray_run(curriculum_of(root, sources, **partitions), tmp_path / "curriculum.yaml") as second:
            assert second.wait(timeout=900) == 0
    assert finished() > 100
    write_in_process(curriculum_of(tmp_path / "undisturbed", sources, **partitions))
    assert contents(root) == contents(tmp_path / "undisturbed")


def die(_: SourcePartition) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def all_die() -> None:
    with (
        workers(1, None) as ray,
        pytest.raises(WorkerError, match=r"ended again and again at photos/a\.tar: .*fewer --workers"),
    ):
        list(ray.run(die, [(SourcePartition("photos", "a.tar", {}),)]))


@pytest.mark.slow
def test_a_part_at_which_every_worker_dies_is_named() -> None:
    """In a process of its own: Ray takes the token of its first cluster for all later ones."""
    subprocess.run([sys.executable, "-c", f"import {__name__} as t; t.all_die()"], check=True)


@pytest.mark.slow
def test_models_in_actors_give_what_they_give_in_the_process(tmp_path: Path) -> None:
    assets = Path("assets/shapes").absolute()

    def curriculum(root: Path) -> Curriculum:
        tree = curriculum_of(root, mixture={"t2i": 1}).model_dump(mode="json")
        tree["backbones"] = {"vlm": str(assets / "vlm"), "sana": str(assets / "sana")}
        tree["data"]["prepare"]["latents"] = {"dtype": "bfloat16"}
        tree["data"]["prepare"]["caption"] = {"vlm": str(assets / "vlm"), "which": "all", "max_tokens": 8}
        tree["data"]["prepare"]["sources"] = collection(tmp_path / "source", copies=1)[:1]
        return Curriculum.model_validate(tree)

    with ray_run(curriculum(tmp_path / "ray"), tmp_path / "curriculum.yaml") as process:
        assert process.wait(timeout=900) == 0
    write_in_process(curriculum(tmp_path / "here"))
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (None, "Ray did not start on this machine (no raylet); repeat the command when the machine is less busy"),
        ("10.0.0.1:6379", "Ray at 10.0.0.1:6379 does not answer (no raylet); correct --ray"),
    ],
)
def test_a_cluster_that_is_not_there_is_a_sentence_and_may_be_tried_again(address, words, monkeypatch):
    def init(**_):
        raise Exception("no raylet")  # As Ray raises it.

    # Not the real one: it reads its settings at import, which would be too early for the tests that follow.
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init, shutdown=lambda: None))
    with pytest.raises(RayError, match=re.escape(words)) as raised, ray_cluster(address, 1):
        pass
    assert exit_code(raised.value) == FAILED
