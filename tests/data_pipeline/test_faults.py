"""Kill -9 at the boundaries of writing, then the same command again: the bytes of an undisturbed run come out."""

import os
import resource
import signal
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from streaming import MDSWriter

from data_pipeline import write as writing
from data_pipeline.write import write
from tests.data_pipeline.worlds import SHAPES, collection, curriculum_of
from wemmu.config import Curriculum
from wemmu.config.shards import DataSet

# What stands between "not there" and "there": bytes into a shard, a shard to disk, names, the ledger, the index.
BOUNDARIES: list[tuple[Any, str]] = [
    (MDSWriter, "write"),
    (MDSWriter, "flush_shard"),
    (os, "fsync"),
    (os, "replace"),
    (writing, "finish"),
]


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a data set but the lock and the report, which says how long it took."""
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in root.rglob("*")
        if p.is_file() and p.name != ".lock" and not p.name.startswith("report.")
    }


class Countdown:
    """Runs the process out at the n-th crossing of a boundary, before or after it."""

    def __init__(self, at: int | None, after: bool):
        self.crossed, self._at, self._after = 0, at, after

    def around(self, function: Callable) -> Callable:
        def crossing(*args: Any, **kwargs: Any) -> Any:
            self.crossed += 1
            if self.crossed == self._at and not self._after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if self.crossed == self._at and self._after:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return crossing


def write_here(curriculum: Curriculum) -> DataSet:
    return write(curriculum, Console(file=StringIO()), workers=0)


def in_child(function: Callable[[], None]) -> int:
    """Run in a forked process; returns how it ended (0, or minus the signal)."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_write(curriculum: Curriculum, at: int, after: bool) -> int:
    def doomed() -> None:
        countdown = Countdown(at, after)
        for owner, name in BOUNDARIES:
            setattr(owner, name, countdown.around(getattr(owner, name)))
        write_here(curriculum)

    return in_child(doomed)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Photographs with captions, edits of them, drawings; broken records among them."""
    return [*collection(tmp_path_factory.mktemp("source"), copies=2), SHAPES | {"samples": {"t2i": 5}}]


@pytest.fixture(scope="module")
def undisturbed(sources: list, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], int]:
    """The data set that has to come out, and the number of boundaries that are crossed on the way."""
    root, countdown = tmp_path_factory.mktemp("undisturbed") / "shards", Countdown(None, False)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in BOUNDARIES:
            patch.setattr(owner, name, countdown.around(getattr(owner, name)))
        write_here(curriculum_of(root, sources))
    return contents(root), countdown.crossed


def test_killed_at_any_boundary_and_run_again(
    sources: list, undisturbed: tuple[dict[str, bytes], int], tmp_path: Path
) -> None:
    expected, total = undisturbed
    assert total > 100
    # The boundaries of the first partition, some of all the others, and the last ones, where the index is made. Every
    # second time behind the boundary, where what it did has happened and nothing else has.
    for place, at in enumerate((*range(1, 24), *range(24, total - 10, 29), *range(total - 10, total + 1))):
        curriculum = curriculum_of(tmp_path / str(at), sources)
        assert killed_write(curriculum, at, after=place % 2 == 1) == -signal.SIGKILL
        write_here(curriculum)
        assert contents(tmp_path / str(at)) == expected, at


def test_killed_again_and_again(sources: list, undisturbed: tuple[dict[str, bytes], int], tmp_path: Path) -> None:
    """Runs that each live for some boundaries more than it takes to look at what is there still come to the end."""
    curriculum = curriculum_of(tmp_path / "shards", sources)
    ended = [killed_write(curriculum, 60, False) for _ in range(20)]
    assert ended[0] == -signal.SIGKILL
    assert ended[-1] == 0
    assert contents(tmp_path / "shards") == undisturbed[0]


def test_a_shard_that_cannot_be_written_is_named(sources: list, tmp_path: Path) -> None:
    curriculum = curriculum_of(tmp_path / "shards", sources)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Bytes: the settings fit, a shard of photographs does not, as on a disk that fills up. Python ignores SIGXFSZ.
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as refused:
            write_here(curriculum)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert refused.value.filename is not None
    assert str(tmp_path / "shards/t2i") in str(refused.value)
    assert not list((tmp_path / "shards").rglob("*.tmp"))


def test_a_report_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    curriculum, said = curriculum_of(tmp_path / "shards", [SHAPES | {"samples": {"t2i": 5, "edit": 5}}]), StringIO()
    write_here(curriculum)
    (tmp_path / "shards/report.json").unlink()
    (tmp_path / f"shards/report.html.{os.getpid()}.tmp").mkdir()
    write(curriculum, Console(file=said, soft_wrap=True), workers=0)
    assert str(tmp_path / "shards/report.html") in said.getvalue()
