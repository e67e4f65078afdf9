"""Writing: what is planned, what is kept, what is refused, and what is left when a run is killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import pytest
from filelock import FileLock
from rich.console import Console

from data_pipeline.__main__ import main
from data_pipeline.inspect import inspect_dataset
from data_pipeline.partitions import Partition, finished_shards, write_partition
from data_pipeline.plan import PARTITION, plan
from data_pipeline.write import unfinished, write
from wemmu.config import ConfigError, Curriculum, dump
from wemmu.config.schema import Prepare
from wemmu.config.shards import DATASET_FILE, DataSet, ShardError

CurriculumOf = Callable[..., Curriculum]
WriteWithoutRay = Callable[..., DataSet]
QUIET = Console(file=StringIO())


def with_prepare(curriculum: Curriculum, **changes: object) -> Curriculum:
    assert curriculum.data.prepare is not None
    prepare = Prepare.model_validate({**curriculum.data.prepare.model_dump(), **changes})
    return curriculum.model_copy(update={"data": curriculum.data.model_copy(update={"prepare": prepare})})


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a data set but the lock."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name != ".lock"}


# ------------------------------------------------------------------------------------------------------------ plan
def test_a_stream_for_every_task_and_resolution_in_use(tmp_path: Path, curriculum_of: CurriculumOf) -> None:
    curriculum = curriculum_of(tmp_path, mixture={"t2i": 1, "edit": 1})
    (low,) = curriculum.stages
    high = low.model_copy(update={"name": "high", "resolution": 48, "mixture": {"edit": 1.0}})
    again = high.model_copy(update={"name": "again"})
    names = [s.name for s in plan(curriculum.model_copy(update={"stages": (low, high, again)}))]
    assert names == ["t2i/32/32x32", "edit/32/32x32", "edit/48/48x48"]


def test_a_task_without_a_number_of_samples_is_refused(tmp_path: Path, curriculum_of: CurriculumOf) -> None:
    with pytest.raises(ConfigError, match=r"stage only mixes edit.*counts only: t2i"):
        plan(with_prepare(curriculum_of(tmp_path, mixture={"edit": 1}), samples={"t2i": 5}))


def test_a_curriculum_that_prepares_nothing_is_refused(tmp_path: Path, curriculum_of: CurriculumOf) -> None:
    with pytest.raises(ConfigError, match=r"no data\.prepare"):
        plan(curriculum_of(tmp_path, prepare=None))


# ------------------------------------------------------------------------------------- what is kept, what is refused
def test_a_complete_data_set_costs_no_heavy_import(
    tmp_path: Path, curriculum_of: CurriculumOf, write_without_ray: WriteWithoutRay
) -> None:
    curriculum = curriculum_of(tmp_path / "shards")
    write_without_ray(curriculum, PARTITION)
    dump(curriculum, tmp_path / "curriculum.yaml")
    before = contents(tmp_path)
    command = [sys.executable, "-X", "importtime", "-m", "data_pipeline", "write", str(tmp_path / "curriculum.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "is complete" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "wemmu.config" in imported
    assert not imported & {"ray", "streaming", "torch", "transformers"}
    assert contents(tmp_path) == before


def test_the_command_refuses_in_words(
    shards: Path,
    tmp_path: Path,
    curriculum_of: CurriculumOf,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    dump(curriculum_of(shards), tmp_path / "curriculum.yaml")
    arguments = ["data_pipeline", "write", str(tmp_path / "curriculum.yaml"), "--set", "data.prepare.seed=6"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert "seed: 6, not 5" in capsys.readouterr().err


def test_other_settings_are_refused_by_name(shards: Path, curriculum_of: CurriculumOf) -> None:
    before = contents(shards)
    curriculum = curriculum_of(shards)
    for changes, words in (
        ({"seed": 6}, "seed: 6, not 5"),
        ({"samples": {**curriculum.data.prepare.samples, "edit": 99}}, "edit/32/32x32.*samples: 99, not 26"),
    ):
        with pytest.raises(ShardError, match=words):
            write(with_prepare(curriculum, **changes), QUIET, partition=7)
    assert contents(shards) == before


def test_other_settings_are_refused_of_a_data_set_just_begun(tmp_path: Path, curriculum_of: CurriculumOf) -> None:
    curriculum = curriculum_of(tmp_path)
    write_partition(unfinished(tmp_path, plan(curriculum, 7))[0])
    with pytest.raises(ShardError, match="seed: 6, not 5"):
        write(with_prepare(curriculum, seed=6), QUIET, partition=7)


def test_streams_are_added_to_those_there_are(
    tmp_path: Path, curriculum_of: CurriculumOf, write_without_ray: WriteWithoutRay
) -> None:
    write_without_ray(curriculum_of(tmp_path, mixture={"t2i": 1}))
    before = contents(tmp_path)
    both = write_without_ray(curriculum_of(tmp_path, mixture={"edit": 1}))
    assert {s.settings.name for s in both.streams} == {"t2i/32/32x32", "edit/32/32x32"}
    after = contents(tmp_path)
    assert {name for name in before if after[name] != before[name]} == {DATASET_FILE}
    assert both == DataSet.at(tmp_path)


def test_two_writers_do_not_meet(tmp_path: Path, curriculum_of: CurriculumOf) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(ShardError, match="another process is writing"):
        write(curriculum_of(tmp_path), QUIET)


def test_only_what_is_missing_or_damaged_is_written_again(
    tmp_path: Path, curriculum_of: CurriculumOf, write_without_ray: WriteWithoutRay
) -> None:
    curriculum = curriculum_of(tmp_path, mixture={"t2i": 1})
    write_without_ray(curriculum)
    whole = contents(tmp_path)
    stream = tmp_path / "t2i/32/32x32"
    (tmp_path / DATASET_FILE).unlink()
    (stream / "00001/index.json").unlink()
    shard = stream / "00003/shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-1])
    (stream / "00002.left-by-a-killed-run.tmp").mkdir()
    missing = unfinished(tmp_path, plan(curriculum, 7))
    assert [partition.number for partition in missing] == [1, 3]
    write_without_ray(curriculum)
    assert contents(tmp_path) == whole


def test_a_worker_that_comes_second_leaves_what_is_there(tmp_path: Path, curriculum_of: CurriculumOf) -> None:
    partition = Partition(tmp_path, plan(curriculum_of(tmp_path), 7)[0], 0)
    assert write_partition(partition) == 7
    before = contents(tmp_path)
    assert write_partition(partition) == 7
    assert contents(tmp_path) == before
    assert finished_shards(partition) is not None


def test_inspect_shows_every_stream_and_an_example(shards: Path) -> None:
    out = StringIO()
    inspect_dataset(shards, Console(file=out, width=300))
    for task in ("t2i", "reconstruction", "unconditional", "edit", "multi_edit"):
        assert f"{task}/32/32x32" in out.getvalue()
        assert f"shapes/5/{task}/0" in out.getvalue()


# --------------------------------------------------------------------------------------------------------- kill -9
@contextmanager
def ray_run(curriculum_file: Path, partition: int) -> Iterator[subprocess.Popen]:
    """A writing process; whatever it leaves behind is ended with it."""
    code = (
        "from pathlib import Path\nfrom rich.console import Console\n"
        "from data_pipeline.write import write\nfrom wemmu.config import load_curriculum\n"
        f"write(load_curriculum(Path({str(curriculum_file)!r})), Console(), workers=1, partition={partition})"
    )
    # The mark finds the processes that Ray starts, which leave the group and the session of their parent.
    mark = f"WEMMU_TEST_RUN={os.getpid()}-{time.monotonic_ns()}"
    name, value = mark.split("=")
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, name: value})
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                if mark.encode() in (directory / "environ").read_bytes():
                    os.kill(int(directory.name), signal.SIGKILL)
            except OSError:
                continue
        for scratch in Path("/tmp").glob(f"ray{process.pid}-*"):
            shutil.rmtree(scratch, ignore_errors=True)


@pytest.mark.slow
def test_a_killed_run_is_finished_by_the_next(
    tmp_path: Path, curriculum_of: CurriculumOf, write_without_ray: WriteWithoutRay
) -> None:
    """With real Ray: kill -9 of the writing process amid its partitions, then again to the end."""
    root, partition = tmp_path / "killed", 25
    samples = {"t2i": 1500, "edit": 1000}
    curriculum = with_prepare(curriculum_of(root, mixture={"t2i": 1, "edit": 1}), samples=samples)
    dump(curriculum, tmp_path / "curriculum.yaml")

    def finished() -> int:
        return len(list(root.glob("*/*/*/[0-9][0-9][0-9][0-9][0-9]")))

    with ray_run(tmp_path / "curriculum.yaml", partition) as process:
        deadline = time.monotonic() + 900
        while finished() < 5:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert finished() < 100
        # Right away, while workers of the killed run may still be writing.
        with ray_run(tmp_path / "curriculum.yaml", partition) as second:
            assert second.wait(timeout=240) == 0
    assert finished() == 100
    undisturbed = with_prepare(curriculum_of(tmp_path / "undisturbed", mixture={"t2i": 1, "edit": 1}), samples=samples)
    write_without_ray(undisturbed, partition)
    assert contents(root) == contents(tmp_path / "undisturbed")
