"""Whatever a cluster does to a run, its weights are those of the undisturbed one, and the ledger tells the story."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.patience import eventually
from tests.slurm import jobs
from tests.slurm.jobs import PATIENCE_S, record, slurm, start_again_soon, submit, wait_for
from tests.slurm.runs import (
    REPOSITORY,
    STEPS,
    World,
    assert_equal_weights,
    launcher,
    paused,
    saved_at_least,
    story,
    train_here,
)

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

ZERO3 = {"engine": "zero3", "ranks": 2}
ONE, TWO = ("--nodes=1", "--cpus-per-task=1"), ("--nodes=2", "--cpus-per-task=1")
HERE = ("--gres=none", "--time=20")


@pytest.fixture(scope="module")
def straight(world: World) -> Path:
    """The run of one rank that nobody disturbed."""
    train_here(world.curriculum("straight"), world.folder / "straight", ("stage1", "stage2"))
    return world.folder / "straight"


@pytest.fixture(scope="module")
def straight_zero3(world: World) -> Path:
    train_here(world.curriculum("straight-zero3", parallel=ZERO3), world.folder / "straight-zero3", ("stage1",))
    return world.folder / "straight-zero3"


@pytest.fixture
def stage(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Path]]:
    """Submits the script of a stage by hand, as `RUN=... CURRICULUM=... sbatch slurm/stage1.sh`."""
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def submit_stage(*options: str, name: str = "run", number: int = 1, **changes: object) -> tuple[int, Path]:
        run = tmp_path / name
        monkeypatch.setenv("RUN", str(run))
        monkeypatch.setenv("CURRICULUM", str(world.curriculum(name, **changes)))
        resources = TWO if "parallel" in changes else ONE
        script = REPOSITORY / "slurm" / f"stage{number}.sh"
        return submit(script, tmp_path, *HERE, "--oversubscribe", *resources, *options), run

    return submit_stage


def until(condition: Callable[[], bool], job: int) -> None:
    """Wait for it; fail the test if the job ends before, or never comes so far."""

    def holds() -> bool:
        if condition():
            return True
        state = record(job)["JobState"]
        assert state not in jobs.FINAL, f"job {job} is {state}; it printed:\n{jobs.output(job)}"
        return False

    eventually(holds, lambda: jobs.output(job), seconds=PATIENCE_S, every=0.1)


def told(run: Path, job: str = "stage1") -> list[tuple[str, str]]:
    return [(event.event, event.outcome) for event in story(run, job)]


STRAIGHT = [("started", ""), ("ended", "finished")]
AGAIN = [("started", ""), ("ended", "saved"), ("requeued", ""), *STRAIGHT]
AFTER_A_CRASH = [("started", ""), ("ended", "crashed"), ("requeued", ""), *STRAIGHT]


def test_the_script_of_a_stage_works_by_itself(stage, straight: Path) -> None:
    first, run = stage()
    wait_for(first, "COMPLETED", PATIENCE_S)
    second, _ = stage(number=2)
    wait_for(second, "COMPLETED", PATIENCE_S)
    for name in ("stage1", "stage2"):
        assert told(run, name) == STRAIGHT
        assert_equal_weights(run, straight, name)


def test_a_stage_whose_gate_does_not_hold_never_begins(stage) -> None:
    job, run = stage(number=2)
    wait_for(job, "FAILED", PATIENCE_S)
    [refused] = story(run, "stage2")
    assert (refused.event, refused.outcome) == ("refused", "failed")
    assert "stage1 has no whole checkpoint of its last step" in refused.reason
    assert "stage2 cannot start" in jobs.output(job)


def test_a_preempted_stage_saves_and_goes_on_as_the_same_job(stage, straight: Path, tmp_path: Path) -> None:
    job, run = stage("--partition=low")
    until(saved_at_least(run, "stage1", 4), job)
    # With SIGTERM, Slurm sends the SIGCONT that ends the pause.
    with paused(run):
        submit("", tmp_path, "--partition=high", "--nodes=2", "--exclusive")
        until(lambda: len(story(run, "stage1")) > 1, job)
    start_again_soon(job)
    wait_for(job, "COMPLETED", PATIENCE_S)
    assert told(run) == AGAIN
    assert story(run, "stage1")[1].reason == "was pre-empted and saved its state"
    assert story(run, "stage1")[3].from_step == story(run, "stage1")[1].to_step >= 4
    assert record(job)["Restarts"] == "1"
    assert_equal_weights(run, straight, "stage1")


def test_a_stage_near_its_time_limit_saves_and_goes_on_as_the_same_job(stage, straight: Path) -> None:
    job, run = stage("--time=3", "--signal=B:USR1@90")
    until(saved_at_least(run, "stage1", 4), job)
    # It shall not be done before its time is up.
    with paused(run):
        until(lambda: "warned" in (run / "ledger.jsonl").read_text(), job)
    start_again_soon(job)
    wait_for(job, "COMPLETED", PATIENCE_S)
    # On a machine so busy that the time is up again there are more attempts.
    assert told(run)[:4] == AGAIN[:4]
    assert told(run)[-1] == AGAIN[-1]
    assert story(run, "stage1")[1].reason == "was near its time limit and saved its state"
    assert_equal_weights(run, straight, "stage1")


def test_a_killed_rank_ends_the_others_and_all_begin_again(stage, straight_zero3: Path) -> None:
    job, run = stage(parallel=ZERO3)
    until(saved_at_least(run, "stage1", 4), job)
    with paused(run) as ranks:
        os.kill(ranks[1], signal.SIGKILL)
    start_again_soon(job)
    wait_for(job, "COMPLETED", PATIENCE_S)
    assert told(run) == AFTER_A_CRASH
    assert "failed" in story(run, "stage1")[1].reason
    assert_equal_weights(run, straight_zero3, "stage1")


def test_two_chains_on_the_same_nodes_do_not_meet(stage, straight_zero3: Path) -> None:
    started = [stage(name=name, parallel=ZERO3) for name in ("one", "two")]
    for job, run in started:
        wait_for(job, "COMPLETED", PATIENCE_S)
        assert_equal_weights(run, straight_zero3, "stage1")


@pytest.fixture
def node(stage) -> Iterator[Callable[[int], str]]:
    """The node of a job of one; whatever the test does to it, it is back in service afterwards."""
    touched: list[str] = []

    def of(job: int) -> str:
        touched.append(record(job)["NodeList"])
        return touched[-1]

    yield of
    subprocess.run([REPOSITORY / ".ci" / "slurm", "start"], check=True, timeout=120)
    for name in touched:
        subprocess.run(["scontrol", "update", f"NodeName={name}", "State=RESUME"], check=False, timeout=60)


def test_a_stage_outlives_the_daemon_of_its_node(stage, node, straight: Path) -> None:
    job, run = stage()
    until(saved_at_least(run, "stage1", 4), job)
    with paused(run):
        kill_daemon("slurmd", node(job))
    until(saved_at_least(run, "stage1", STEPS), job)
    subprocess.run([REPOSITORY / ".ci" / "slurm", "start"], check=True, timeout=120)
    wait_for(job, "COMPLETED", PATIENCE_S)
    assert told(run) == STRAIGHT
    assert_equal_weights(run, straight, "stage1")


def test_a_stage_whose_node_is_lost_begins_again(stage, node, straight: Path) -> None:
    job, run = stage()
    until(saved_at_least(run, "stage1", 4), job)
    lost = node(job)
    with paused(run):
        slurm("scontrol", "update", f"NodeName={lost}", "State=DOWN", "Reason=test")
    wait_for(job, "COMPLETED", PATIENCE_S)
    first, last = (event for event in story(run, "stage1") if event.event == "started")
    assert first.nodes == lost
    assert last.from_step >= 4
    assert record(job)["Restarts"] == "1"
    assert_equal_weights(run, straight, "stage1")


def test_a_crashed_stage_waits_for_a_controller_that_is_down(stage, straight: Path) -> None:
    job, run = stage()
    until(saved_at_least(run, "stage1", 4), job)
    printed = Path(record(job)["StdOut"])
    try:
        with paused(run) as ranks:
            kill_daemon("slurmctld")
            os.kill(ranks[0], signal.SIGKILL)
        eventually(lambda: "; again in" in printed.read_text(), printed.read_text, seconds=PATIENCE_S, every=0.1)
    finally:
        subprocess.run([REPOSITORY / ".ci" / "slurm", "start"], check=True, timeout=120)
    start_again_soon(job)
    wait_for(job, "COMPLETED", PATIENCE_S)
    assert told(run) == AFTER_A_CRASH
    assert_equal_weights(run, straight, "stage1")


def kill_daemon(*words: str) -> None:
    """Kill the daemon of Slurm whose command holds these words."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if set(words) <= {Path(command[0]).name, *command[1:]}:
            os.kill(int(process.name), signal.SIGKILL)
            return
    pytest.fail(f"no {' '.join(words)} runs")


def test_a_failure_for_good_ends_the_chain_and_resume_brings_it_to_its_end(
    world: World, profile: Path, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    curriculum = world.curriculum("strict")
    strict = ("--set", "stages.stage1.gate.max_loss=-1")
    launcher("submit", curriculum, "--cluster", profile, "--out", run, *strict)
    try:
        assert "has jobs in Slurm" in launcher("submit", curriculum, "--out", run, *strict, code=78)
        assert "has jobs in Slurm" in launcher("run", curriculum, "--out", run, *strict, code=78)
        status = partial(launcher, "status", run)
        # Asking costs a core a second.
        eventually(lambda: "cancelled" in status(), status, seconds=PATIENCE_S, every=4)
        shown = status()
        assert "refused: stage1 ended with a loss of" in shown
        assert "a job it waited for did not finish" in shown
        [refused] = story(run, "stage2")[1:]
        assert "gate.max_loss is -1" in refused.reason
        # The gate says whether to go on, not what comes out: it may be changed.
        launcher("resume", run, "--set", "stages.stage1.gate.max_loss=99")
        # The last job of the chain, after both stages and the export.
        done = run / "report.html"
        eventually(done.exists, status, seconds=PATIENCE_S, every=1)
        assert (run / "export" / "model_index.json").exists()
        assert len([event for event in story(run, "stage1") if event.event == "started"]) == 1
        for stage in ("stage1", "stage2"):
            assert_equal_weights(run, straight, stage)
    finally:
        launcher("cancel", run)


def test_a_job_whose_attempt_is_killed_goes_back_into_the_queue(stage, straight: Path) -> None:
    job, run = stage()
    until(saved_at_least(run, "stage1", 4), job)
    attempt = next(event.pid for event in story(run, "stage1") if event.event == "started")
    assert attempt is not None
    with paused(run):
        os.kill(attempt, signal.SIGKILL)
        eventually(lambda: record(job)["JobState"] != "RUNNING", partial(jobs.output, job), seconds=60, every=0.2)
    start_again_soon(job)
    wait_for(job, "COMPLETED", PATIENCE_S)
    assert [outcome for event, outcome in told(run) if event == "ended"] == ["crashed", "finished"]
    assert record(job)["Restarts"] == "1"
    assert_equal_weights(run, straight, "stage1")
