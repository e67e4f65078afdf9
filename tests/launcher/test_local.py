"""Jobs that end well, badly, too early and not at all."""

import json
import os
import signal
from pathlib import Path

import pytest

from launcher import local
from launcher.job import Job, is_finished, last_step
from launcher.ledger import Event, Ledger
from launcher.lock import at_work, locked
from tests.launcher.jobs import script, trainer
from tests.patience import eventually
from wemmu.locks import LockedError, is_alive

WRITES_PRODUCT = "import sys; open(sys.argv[1] + '/made.json', 'a').write('[]')"


def run(folder: Path, *jobs: Job) -> int:
    with locked(folder, patience=0) as lock:
        return local.run(jobs, Ledger(folder / "ledger.jsonl"), lock)


def endings(folder: Path) -> list[Event]:
    return [event for event in Ledger(folder / "ledger.jsonl").events() if event.event == "ended"]


def steps_of(job: Job) -> int:
    step = last_step(job)
    assert step is not None
    return step


def test_jobs_run_in_order_and_are_not_run_again(tmp_path: Path):
    jobs = [script(tmp_path, "first", WRITES_PRODUCT, tmp_path / "made.json"), trainer(tmp_path)]
    assert run(tmp_path, *jobs) == 0
    assert run(tmp_path, *jobs) == 0
    assert (tmp_path / "made.json").read_text() == "[]"
    assert [(end.job, end.exit_code, end.from_step, end.to_step, end.reason) for end in endings(tmp_path)] == [
        ("first", 0, None, None, "finished"),
        ("stage1", 0, 0, 3, "finished"),
    ]


def test_a_job_without_products_is_asked_every_time(tmp_path: Path):
    job = script(tmp_path, "data", "pass")
    assert run(tmp_path, job) == run(tmp_path, job) == 0
    assert [end.attempt for end in endings(tmp_path)] == [1, 2]


@pytest.mark.parametrize(("said", "used"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_of_a_job_sleep_when_they_wait_unless_the_user_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str | None, used: str
):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if said:
        monkeypatch.setenv("OMP_WAIT_POLICY", said)
    code = "import os, sys; open(sys.argv[1] + '/policy', 'w').write(os.environ['OMP_WAIT_POLICY'])"
    assert run(tmp_path, script(tmp_path, "first", code)) == 0
    assert (tmp_path / "policy").read_text() == used


def test_a_torn_product_does_not_count(tmp_path: Path):
    (tmp_path / "made.json").write_text('{"half": ')
    job = script(
        tmp_path, "first", "import sys; open(sys.argv[1] + '/made.json', 'w').write('[]')", tmp_path / "made.json"
    )
    assert run(tmp_path, job) == 0
    assert json.loads((tmp_path / "made.json").read_text()) == []


def test_a_product_older_than_its_input_is_made_again(tmp_path: Path):
    source, product = tmp_path / "source", tmp_path / "made.json"
    source.write_text("x")
    product.write_text("[]")
    job = Job("made", (), tmp_path / "log", (product,), (source,))
    os.utime(source, (100, 100))
    os.utime(product, (200, 200))
    assert is_finished(job)
    os.utime(source, (300, 300))
    assert not is_finished(job)


def test_a_checkpoint_still_being_written_is_not_one(tmp_path: Path):
    job = trainer(tmp_path)
    for name, manifest in (
        ("step_00000001", '{"step": 1}'),
        ("step_00000002.tmp", '{"step": 2}'),
        ("step_00000003", '{"ha'),
    ):
        (job.folder / "checkpoints" / name).mkdir(parents=True)
        (job.folder / "checkpoints" / name / "manifest.json").write_text(manifest)
    assert last_step(job) == 1
    assert not is_finished(job)


def test_a_failure_stops_the_chain_and_says_why_and_where(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    bad = script(tmp_path, "bad", "print('about to fall'); import sys; sys.exit(3)")
    assert run(tmp_path, bad, trainer(tmp_path)) == 1
    output, error = capfd.readouterr()
    assert "about to fall" in output
    assert f"bad failed with exit code 3. Its log: {tmp_path}/bad.log" in error
    assert "    about to fall" in error
    assert not (tmp_path / "stage1").exists()


def test_the_reason_shows_the_lines_of_this_attempt_only(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    run(tmp_path, script(tmp_path, "bad", "raise SystemExit('old trouble')"))
    capfd.readouterr()
    run(tmp_path, script(tmp_path, "bad", "raise SystemExit('new trouble')"))
    error = capfd.readouterr().err
    assert "new trouble" in error
    assert "old trouble" not in error
    assert "old trouble" in (tmp_path / "bad.log").read_text()


def test_success_without_the_product_is_a_failure(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    assert run(tmp_path, script(tmp_path, "empty", "pass", tmp_path / "made.json")) == 1
    assert f"wrote no complete {tmp_path}/made.json" in capfd.readouterr().err


def test_a_job_killed_by_a_signal_is_told_from_one_that_failed(tmp_path: Path):
    assert run(tmp_path, script(tmp_path, "bad", "import os; os.kill(os.getpid(), 9)")) == 1
    assert "killed by SIGKILL" in endings(tmp_path)[0].reason


def test_an_interruption_from_elsewhere_stops_the_chain_but_is_no_failure(tmp_path: Path):
    assert run(tmp_path, script(tmp_path, "saved", "raise SystemExit(75)"), trainer(tmp_path)) == 75
    assert endings(tmp_path)[0].reason == "was interrupted and saved its state"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_reaches_the_job_once_and_the_same_command_goes_on(tmp_path: Path, launch, number: int, code: int):
    job = trainer(tmp_path, steps=1000)
    launcher = launch(job, script(tmp_path, "after", "pass"))
    eventually(lambda: steps_of(job) >= 2)
    # To the whole group, as the terminal does it.
    os.killpg(launcher.pid, number)
    launcher.communicate(timeout=60)
    assert launcher.returncode == code
    assert (job.folder / "signals").read_text() == f"{number} "
    [end] = endings(tmp_path)
    assert (end.exit_code, end.reason) == (75, "was interrupted and saved its state")
    assert not (tmp_path / "after.log").exists()

    again = trainer(tmp_path, steps=steps_of(job) + 1)
    assert run(tmp_path, again) == 0
    assert endings(tmp_path)[-1].from_step == steps_of(job) - 1


@pytest.mark.parametrize(("number", "code"), [(0, 1), (signal.SIGINT, 130)], ids=["head", "tee and Ctrl-C"])
def test_when_the_reader_of_the_output_ends_the_job_saves_and_its_end_is_recorded(
    tmp_path: Path, launch, number: int, code: int
):
    job = trainer(tmp_path, steps=1000)
    launcher = launch(job, script(tmp_path, "after", "pass"))
    eventually(lambda: steps_of(job) >= 2)
    os.kill(launcher.pid, number)
    # As `2>&1 | tee` does.
    launcher.stdout.close()
    launcher.stderr.close()
    assert launcher.wait(60) == code
    [end] = endings(tmp_path)
    assert (end.exit_code, end.reason) == (75, "was interrupted and saved its state")
    assert (job.folder / "signals").read_text() == f"{number or signal.SIGTERM} "
    assert not (tmp_path / "after.log").exists()


def test_a_second_interrupt_kills_a_job_that_will_not_stop(tmp_path: Path, launch):
    deaf = "import signal, sys, time; signal.signal(2, signal.SIG_IGN); open(sys.argv[1] + '/on', 'w'); time.sleep(60)"
    launcher = launch(script(tmp_path, "deaf", deaf))
    eventually((tmp_path / "on").exists)
    launcher.send_signal(signal.SIGINT)
    assert "second Ctrl-C" in launcher.stderr.readline() + launcher.stderr.readline()
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=60)
    assert launcher.returncode == 130
    assert endings(tmp_path)[0].reason == "was killed by a second interrupt"


def test_when_the_launcher_is_killed_its_job_saves_and_the_same_command_goes_on(tmp_path: Path, launch):
    job = trainer(tmp_path, steps=1000)
    launcher = launch(job)
    eventually(lambda: steps_of(job) >= 2)
    pid = Ledger(tmp_path / "ledger.jsonl").of("stage1")[0].pid
    launcher.kill()
    launcher.wait()
    # At once, as a supervisor would do it: the new launcher waits for the old job, then begins where it stopped.
    follower = launch(job)
    eventually(lambda: len(Ledger(tmp_path / "ledger.jsonl").of("stage1")) == 2)
    assert not is_alive(pid)
    assert (job.folder / "signals").read_text() == f"{signal.SIGTERM} "
    assert Ledger(tmp_path / "ledger.jsonl").of("stage1")[1].from_step == int((job.folder / "stopped_at").read_text())
    follower.send_signal(signal.SIGTERM)


def test_two_launchers_cannot_work_on_one_folder(tmp_path: Path, launch):
    job = trainer(tmp_path, steps=1000)
    first = launch(job)
    eventually(lambda: steps_of(job) >= 1)
    second = launch(job)
    assert f"refused: another launcher (pid {first.pid}) is at work on {tmp_path}" in second.communicate(timeout=60)[1]
    assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    with locked(tmp_path, patience=0):
        pass


def test_a_job_is_at_work_once_and_others_of_the_folder_beside_it(tmp_path: Path):
    job, other = trainer(tmp_path), trainer(tmp_path, "stage2")
    with at_work(tmp_path, job):
        with at_work(tmp_path, other), pytest.raises(LockedError, match=r"stage1 of .* is at work elsewhere"):
            at_work(tmp_path, job, patience=0).__enter__()
        with pytest.raises(LockedError, match="a Slurm job, or a launcher"), locked(tmp_path, patience=0):
            pass
    with locked(tmp_path, patience=0), pytest.raises(LockedError):
        at_work(tmp_path, job, patience=0).__enter__()


def test_each_job_says_its_place_and_the_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    first, second = trainer(tmp_path, "stage1"), trainer(tmp_path, "stage2")
    judged = [
        Job(f"{job.name}/evaluation", (), tmp_path / "log", (tmp_path / job.name / "judged",))
        for job in (first, second)
    ]
    jobs = [first, judged[0], second, judged[1]]
    assert local.seconds_left(jobs, ledger) is None
    assert run(tmp_path, first) == 0
    (tmp_path / "stage1" / "judged").write_text("x")
    # The clock of the ledger, as it would be had the stage of 3 steps taken 6 s and its evaluation 10 s.
    ledger.file.write_text("")
    for job, event, second_of, to_step in (
        ("stage1", "started", 0, None), ("stage1", "ended", 6, 3),
        ("stage1/evaluation", "started", 6, None), ("stage1/evaluation", "ended", 16, None),
    ):  # fmt: skip
        said = {"job": job, "attempt": 1, "event": event, "from_step": to_step and 0, "to_step": to_step}
        said |= {"reason": "finished", "time": f"2030-01-01T00:00:{second_of:02d}+00:00"}
        with ledger.file.open("a") as file:
            file.write(json.dumps(said) + "\n")
    assert local.seconds_left(jobs, ledger) == 3 * 2 + 10
    capsys.readouterr()
    run(tmp_path, *jobs[:3])
    assert "--- stage2 (job 3 of 3, about 6 s left) ---" in capsys.readouterr().out
