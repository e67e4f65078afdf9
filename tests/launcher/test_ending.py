"""What follows from how an attempt ended."""

from pathlib import Path

import pytest

from launcher.ending import crashes, ending
from launcher.job import Job
from launcher.ledger import Event

JOB = Job("stage1", (), Path("log"), (Path("not-there"),), steps=9)


@pytest.mark.parametrize(
    ("code", "ended", "why"),
    [
        (75, "saved", "was interrupted and saved its state"),
        (78, "failed", "another attempt would fail in the same way"),
        (0, "failed", "wrote no complete not-there"),
        (124, "crashed", "the stacks of all ranks are in its log"),
        (1, "crashed", "failed with exit code 1"),
        (-9, "crashed", "killed by SIGKILL"),
        (137, "crashed", "killed by SIGKILL"),
        (139, "crashed", "killed by SIGSEGV"),
    ],
)
def test_an_exit_code_in_words(code: int, ended: str, why: str):
    found, said = ending(JOB, code)
    assert found == ended
    assert why in said


def test_a_job_whose_product_is_there_is_finished(tmp_path: Path):
    product = tmp_path / "made.txt"
    product.write_text("x")
    assert ending(Job("stage1", (), Path("log"), (product,)), 0) == ("finished", "finished")


def history(*attempts: tuple[str, int, int]) -> list[Event]:
    events: list[Event] = []
    for number, (ended, before, after) in enumerate(attempts, start=1):
        events.append(Event("stage1", number, "started", from_step=before))
        events.append(Event("stage1", number, "ended", from_step=before, to_step=after, outcome=ended))
        events.append(Event("stage1", number, "requeued"))
    return events


@pytest.mark.parametrize(
    ("attempts", "count"),
    [
        ([], 0),
        ([("crashed", 0, 0)], 1),
        ([("crashed", 0, 0), ("crashed", 0, 0)], 2),
        ([("crashed", 0, 0), ("saved", 0, 0), ("crashed", 0, 0)], 2),
        ([("crashed", 0, 0), ("saved", 0, 5), ("crashed", 5, 5)], 1),
        ([("crashed", 0, 0), ("crashed", 0, 4)], 0),
        ([("finished", 0, 9), ("crashed", 9, 9)], 1),
    ],
)
def test_crashes_count_until_an_attempt_comes_further(attempts: list[tuple[str, int, int]], count: int):
    assert crashes(history(*attempts)) == count


def test_a_job_that_was_given_up_has_all_its_tries_when_it_is_submitted_again():
    lost = history(*[("crashed", 0, 0)] * 3)
    given_up = [*lost, Event("stage1", 3, "refused", outcome="failed")]
    assert crashes(lost) == 3
    assert crashes([*given_up, Event("stage1", 0, "submitted", slurm=8), *history(("crashed", 0, 0))]) == 1
    # By hand, `sbatch slurm/stage1.sh`, nobody notes a submission.
    assert crashes([*given_up, *history(("crashed", 0, 0))]) == 1
