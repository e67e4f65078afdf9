"""The test bed itself: what tests and the launcher expect of Slurm is what this Slurm does."""

from pathlib import Path

import pytest

from tests.patience import eventually
from tests.slurm.jobs import output, record, start_again_soon, submit, wait_for, wait_for_output

pytestmark = pytest.mark.slurm

# Says which start it is, then waits for what may come, in its own shell and in a step on every node.
PATIENT = """
echo "start ${SLURM_RESTART_COUNT-0}"
trap 'echo "script: TERM"; exit 143' TERM
[[ -z ${SLURM_RESTART_COUNT-} ]] || exit 0
srun bash -c 'trap "echo step: TERM; exit 75" TERM; echo waiting; while :; do sleep 0.1; done'
"""
EVERYTHING = ("--nodes=2", "--exclusive")
FOREVER = "\nwhile :; do sleep 0.1; done"


def test_a_step_runs_on_two_nodes(tmp_path: Path) -> None:
    script = """srun bash -c 'echo "$SLURMD_NODENAME: $SLURM_PROCID of $SLURM_NTASKS"'"""
    job = submit(script, tmp_path, "--nodes=2", "--ntasks-per-node=1")
    wait_for(job, "COMPLETED")
    assert sorted(output(job).split("\n")[:-1]) == ["n1: 0 of 2", "n2: 1 of 2"]


def test_afterok_waits_for_success_and_never_runs_after_a_failure(tmp_path: Path) -> None:
    good, bad = (submit(f"sleep 1; exit {code}", tmp_path) for code in (0, 1))
    after_good, after_bad = (submit("echo ran", tmp_path, f"--dependency=afterok:{job}") for job in (good, bad))
    wait_for(after_good, "COMPLETED")
    assert record(good)["JobState"] == "COMPLETED"
    wait_for(bad, "FAILED")
    eventually(lambda: record(after_bad)["Reason"] == "DependencyNeverSatisfied", lambda: record(after_bad), every=0.1)
    assert output(after_bad) == ""


def test_a_preempted_job_can_queue_itself_again(tmp_path: Path) -> None:
    """Its steps are told at once; a script that ends then has to ask for its return."""
    job = submit(f"{PATIENT}scontrol requeue $SLURM_JOB_ID{FOREVER}", tmp_path, *EVERYTHING)
    wait_for_output(job, "waiting\nwaiting\n")
    other = submit("echo ran", tmp_path, "--partition=high", *EVERYTHING)
    wait_for(other, "COMPLETED")
    start_again_soon(job)
    wait_for(job, "COMPLETED")
    assert record(job)["Restarts"] == "1"
    assert output(job).count("step: TERM") == 2
    assert output(job).endswith("start 1\n")


def test_a_preempted_job_whose_script_ends_is_not_queued_again(tmp_path: Path) -> None:
    job = submit(f"{PATIENT}exit $?", tmp_path, *EVERYTHING)
    wait_for_output(job, "waiting\nwaiting\n")
    submit("", tmp_path, "--partition=high", *EVERYTHING)
    wait_for(job, "FAILED")
    assert (record(job)["Restarts"], record(job)["ExitCode"]) == ("0", "75:0")


@pytest.mark.slow
def test_a_preempted_job_is_queued_again_under_its_id_when_the_grace_time_is_over(tmp_path: Path) -> None:
    """Slurm looks for that every 30 s; only then the script is told."""
    job = submit(PATIENT + FOREVER, tmp_path, *EVERYTHING)
    wait_for_output(job, "waiting\nwaiting\n")
    other = submit("echo ran", tmp_path, "--partition=high", *EVERYTHING)
    wait_for_output(job, "step: TERM")
    assert "script: TERM" not in output(job)
    wait_for(other, "COMPLETED")
    assert "script: TERM" in output(job)
    start_again_soon(job)
    wait_for(job, "COMPLETED")
    assert output(job).endswith("start 1\n")


@pytest.mark.slow
def test_the_script_is_warned_before_its_time_is_over(tmp_path: Path) -> None:
    """Of a limit of one minute, the least there is; Slurm looks for that every 30 s as well."""
    script = f"""trap 'echo "warned after $SECONDS s"; exit' USR1{FOREVER}"""
    job = submit(script, tmp_path, "--time=1", "--signal=B:USR1@30")
    wait_for(job, "COMPLETED")
    assert output(job).startswith("warned after ")
    assert int(output(job).split()[2]) < 60
