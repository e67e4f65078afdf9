"""What of a chain is sent to Slurm, with which options, and in which order."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from launcher import slurm
from launcher.attempt import Attempt
from launcher.cluster import Cluster
from launcher.job import checkpoint
from launcher.ledger import Ledger
from launcher.plan import chain
from launcher.submit import Submission, as_typed, submissions, submit_all
from tests.launcher.test_plan import curriculum

RUN = Path("/shared/run")
CLUSTER = Cluster(
    name="site",
    partition="gpu",
    account="lab",
    ranks_per_node=4,
    cpus_per_node=64,
    export={"cpus": 8, "partition": "cpu"},
    modules=("cuda/12", "gcc"),
    prolog=Path("/shared/prolog.sh"),
    options=("--reservation=mine",),
)


def by_name(cluster: Cluster = CLUSTER, **changes: object) -> dict[str, Submission]:
    return {one.job.name: one for one in submissions(chain(curriculum(**changes), RUN), RUN, cluster)}


def test_a_training_job_is_sent_with_what_the_cluster_and_the_layout_say():
    stages = {"parallel": {"engine": "zero3", "ranks": 8}, "stages": [wide("a"), wide("b")]}
    one = by_name(**stages)["b"]
    assert one.script.name == "stage.sh"
    assert one.script.exists()
    assert one.arguments == ()
    assert set(one.options) == {
        "--job-name=run/b",
        "--output=/shared/run/b/log.txt",
        "--comment=wemmu /shared/run",
        "--open-mode=append",
        "--requeue",
        "--kill-on-invalid-dep=yes",
        "--partition=gpu",
        "--account=lab",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--time=24:00:00",
        "--gres=gpu:4",
        "--cpus-per-task=64",
        "--signal=B:USR1@600",
        "--exclusive",
        "--reservation=mine",
    }
    said = {name: one.environment[name] for name in ("RUN", "STAGE", "MODULES", "PROLOG")}
    assert said == {"RUN": "/shared/run", "STAGE": "b", "MODULES": "cuda/12 gcc", "PROLOG": "/shared/prolog.sh"}


def wide(name: str) -> dict[str, object]:
    common = {"resolution": 32, "steps": 30, "global_batch": 8, "trains": ["pathway"]}
    return {"name": name, **common, "optimizer": {"lr": 1e-3}, "mixture": {"t2i": 1.0}}


def test_other_jobs_get_their_own_resources():
    jobs = by_name()
    assert {"--gres=gpu:1", "--nodes=1", "--partition=gpu"} < set(jobs["a/evaluation"].options)
    assert {"--gres=none", "--cpus-per-task=8", "--partition=cpu"} < set(jobs["export"].options)
    assert jobs["data"].arguments == ("/shared/run/curriculum.yaml",)
    assert jobs["a/evaluation"].environment["STAGE"] == "a"
    assert not any(option.startswith("--signal") for option in jobs["export"].options)
    # It goes on where it was, as a stage does.
    assert "--signal=B:USR1@600" in jobs["data"].options


def test_ranks_that_do_not_fill_nodes_are_refused():
    with pytest.raises(ValueError, match=r"ranks is 6, which does not fill nodes of 4 ranks \(cluster site\)"):
        by_name(parallel={"engine": "zero3", "ranks": 6}, stages=[wide("a") | {"global_batch": 12}])


@pytest.mark.parametrize("time", [86400, "1 day", "24h"])
def test_a_time_limit_that_is_none_is_refused(time: object):
    with pytest.raises(ValueError, match="valid, in quotes: MINUTES"):
        Cluster(name="site", time=time)


class Sbatch:
    """Notes what is submitted and gives ids from 100 on; fails from the job `full` on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, full: int = 1000) -> None:
        self.calls: list[list[str]] = []
        self.environments: list[dict[str, str]] = []
        self.cancelled: list[int] = []
        self._full = full
        monkeypatch.setattr(slurm, "submit", self._submit)
        monkeypatch.setattr(slurm, "cancel", lambda ids: self.cancelled.extend(ids))

    def _submit(self, options, script, arguments, environment):
        if len(self.calls) == self._full:
            raise slurm.SlurmError("sbatch failed: the queue is full")
        self.calls.append(options)
        self.environments.append(environment)
        return 99 + len(self.calls)

    def dependencies(self) -> list[str]:
        return [next((o for o in options if o.startswith("--dependency")), "") for options in self.calls]


def test_jobs_wait_for_those_before_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sbatch = Sbatch(monkeypatch)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    config = curriculum(stages=[wide("a"), wide("b")])
    ids = submit_all(submissions(chain(config, tmp_path), tmp_path, CLUSTER), Ledger(tmp_path / "ledger.jsonl"))
    assert ids == {
        "data": 100,
        "a": 101,
        "a/evaluation": 102,
        "b": 103,
        "b/evaluation": 104,
        "export": 105,
        "report": 106,
    }
    after = ["", "100", "101", "101", "103", "103", "102:104:105"]
    assert sbatch.dependencies() == [f"--dependency=afterok:{ids}" if ids else "" for ids in after]
    assert [(event.event, event.slurm) for event in Ledger(tmp_path / "ledger.jsonl").of("b")] == [("submitted", 103)]
    # Of the job in which the launcher may itself run, nothing is handed on.
    assert not any("SLURM_JOB_ID" in environment for environment in sbatch.environments)
    assert "secret" not in as_typed(submissions(chain(config, tmp_path), tmp_path, CLUSTER), tmp_path)


def test_a_gate_on_scores_waits_for_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sbatch = Sbatch(monkeypatch)
    config = curriculum(stages=[wide("a") | {"gate": {"scores": {"t2i": 0.5}}}, wide("b")])
    submit_all(submissions(chain(config, tmp_path), tmp_path, CLUSTER), Ledger(tmp_path / "ledger.jsonl"))
    assert sbatch.dependencies()[3] == "--dependency=afterok:101:102"


def test_a_benchmark_has_a_gpu_for_each_rank_and_holds_up_the_stage_whose_gate_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sbatch = Sbatch(monkeypatch)
    bound = {"benchmarks": [{"benchmark": "shapes", "at_least": 0.5}]}
    evaluation = {"prompts": 5, "ranks": 3, "benchmarks": {"shapes": {}}}
    config = curriculum(evaluation=evaluation, stages=[wide("a") | {"gate": bound}, wide("b")])
    jobs = submissions(chain(config, tmp_path), tmp_path, CLUSTER)
    (job,) = [one for one in jobs if one.job.name == "a/shapes"]
    assert {"--gres=gpu:3", "--nodes=1"} < set(job.options)
    # slurm/evaluate.sh names the job by both.
    assert (job.script.name, job.environment["STAGE"], job.environment["BENCHMARK"]) == ("evaluate.sh", "a", "shapes")
    submit_all(jobs, Ledger(tmp_path / "ledger.jsonl"))
    # data, a, a/evaluation, a/shapes, b
    assert sbatch.dependencies()[4] == "--dependency=afterok:101:103"


def test_what_is_finished_is_not_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sbatch = Sbatch(monkeypatch)
    config = curriculum(data={"shards": "shards"}, evaluation={"prompts": 0}, stages=[wide("a"), wide("b")])
    done = checkpoint(tmp_path / "a", 30)
    done.mkdir(parents=True)
    (done / "manifest.json").write_text(json.dumps({"step": 30}))
    ids = submit_all(submissions(chain(config, tmp_path), tmp_path, CLUSTER), Ledger(tmp_path / "ledger.jsonl"))
    assert list(ids) == ["b", "export", "report"]
    assert sbatch.dependencies() == ["", "--dependency=afterok:100", "--dependency=afterok:101"]


def test_a_chain_that_cannot_be_sent_whole_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sbatch = Sbatch(monkeypatch, full=3)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(slurm.SlurmError, match="queue is full"):
        submit_all(submissions(chain(curriculum(), tmp_path), tmp_path, CLUSTER), ledger)
    assert sbatch.cancelled == [100, 101, 102]
    assert [event.event for event in ledger.of("a")] == ["submitted", "cancelled"]


BANNER = "-----\n  Welcome to the Example Supercomputer, 2 nodes free\n-----\n"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands, first in PATH, in which `sbatch` prints a banner and notes its options and environment."""
    folder = tmp_path / "bin"
    folder.mkdir()
    log = tmp_path / "log"
    command(folder / "sbatch", f'printf "%s\\n" "$*" >>{log}; env >>{log}; printf "%s" "{BANNER}"; wc -l <{log}')
    command(folder / "scancel", f'echo "scancel $*" >>{log}')
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return log


def command(file: Path, body: str) -> None:
    file.write_text(f"#!/usr/bin/env bash\n{body}\n")
    file.chmod(0o755)


@pytest.mark.parametrize("answer", ["12", "12;here", "Submitted batch job 12", "Submitted batch job 12 on cluster b"])
def test_the_id_is_found_below_a_banner(site: Path, answer: str):
    command(site.parent / "bin" / "sbatch", f'printf "%s" "{BANNER}"; echo "{answer}"')
    assert slurm.submit([], Path("x.sh"), [], os.environ) == 12


def test_an_answer_without_an_id_is_shown_and_what_was_queued_is_cancelled(site: Path, tmp_path: Path):
    sbatch = f"[[ -e {tmp_path}/first ]] && echo hello || {{ touch {tmp_path}/first; echo 7; }}"
    command(site.parent / "bin" / "sbatch", sbatch)
    with pytest.raises(slurm.SlurmError, match=r"printed no job id(.|\n)*It printed: hello"):
        submit_all(submissions(chain(curriculum(), tmp_path), tmp_path, CLUSTER), Ledger(tmp_path / "ledger.jsonl"))
    assert site.read_text() == "scancel --quiet 7\n"


@pytest.mark.parametrize("inside", [False, True])
def test_only_a_jobs_own_variables_are_kept_from_sbatch(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
):
    monkeypatch.setenv("SLURM_CONF", "/cm/slurm.conf")
    monkeypatch.setenv("SBATCH_ACCOUNT", "project")
    if inside:
        monkeypatch.setenv("SLURM_JOB_ID", "1")
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    submit_all(submissions(chain(curriculum(), tmp_path), tmp_path, CLUSTER), Ledger(tmp_path / "ledger.jsonl"))
    got = site.read_text()
    assert "SLURM_CONF=/cm/slurm.conf" in got
    assert "SBATCH_ACCOUNT=project" in got
    assert "SLURM_CPUS_PER_TASK" not in got


def test_the_typed_commands_run_and_wait_for_each_other(site: Path, tmp_path: Path):
    run = tmp_path / "a run"
    script = as_typed(submissions(chain(curriculum(), run), run, CLUSTER), run)
    early = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert early.returncode == 1
    assert "`wemmu submit` writes it" in early.stderr
    run.mkdir()
    (run / "curriculum.yaml").touch()
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    ids = dict(line.rsplit(": ", 1) for line in done.stdout.splitlines())
    calls = {
        line.split("--job-name=a run/")[1].split()[0]: line
        for line in site.read_text().splitlines()
        if "--job-name" in line
    }
    assert "--dependency" not in calls["data"]
    for name, before in (("a", "data"), ("a/evaluation", "a"), ("b", "a")):
        assert f"--dependency=afterok:{ids[before]} " in calls[name]


@pytest.mark.parametrize("field", ["partition", "qos", "constraint", "memory", "mail_user"])
def test_names_for_slurm_are_one_word(field: str):
    for value in ("gpu, long", "", "64 G"):
        with pytest.raises(ValueError, match=f"{field}\n.*must be one word"):
            Cluster.model_validate({"name": "site", field: value})


def test_each_kind_of_job_has_options_of_its_own():
    cluster = Cluster(
        name="site", partition="gpu", qos="gpu-long", constraint="a100", ranks_per_node=1, gres="gpu:a100", memory="0",
        times={"a": "02:00:00"}, exclusive=False, mail_user="me@example.org", reservation="mine",
        export={"partition": "cpu", "memory": "8G", "account": "cpu-lab"}, evaluation={"gpus": 1, "gres": "gpu:v100"},
        options=("--gres=gpu:h100:1", "--mem=0", "--licenses=x"),
    )  # fmt: skip
    jobs = {name: set(one.options) for name, one in by_name(cluster).items()}
    common = {"--licenses=x", "--mail-user=me@example.org", "--mail-type=END,FAIL"}
    gpu = {"--qos=gpu-long", "--constraint=a100", "--reservation=mine"}
    assert common | gpu | {"--gres=gpu:a100:1", "--mem=0", "--time=02:00:00", "--oversubscribe"} < jobs["a"]
    assert "--exclusive" not in jobs["a"]
    assert common | gpu | {"--gres=gpu:v100:1"} < jobs["a/evaluation"]
    assert common | {"--gres=none", "--mem=8G", "--account=cpu-lab", "--partition=cpu"} < jobs["export"]
    assert not jobs["export"] & (gpu | {"--gres=gpu:h100:1", "--mem=0"})


@pytest.mark.parametrize("state", ["REQUEUE_HOLD", "SPECIAL_EXIT", "SIGNALING", "PENDING"])
def test_a_job_that_may_run_again_is_found_whoever_owns_it(site: Path, state: str):
    # The job of a colleague: with --me it is not listed.
    rows = f'printf "Welcome|to|Example\\n7|{state}|held|n1\\n8|COMPLETED|None|n1\\n"'
    command(site.parent / "bin" / "squeue", f'[[ "$*" == *--me* ]] || {rows}')
    assert slurm.queue([7, 8]) == {7: slurm.Queued(7, state, "held", "n1")}


def test_a_job_that_slurm_has_forgotten_is_not_queued(site: Path):
    command(site.parent / "bin" / "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert slurm.queue([7]) == {}


def test_a_data_job_is_tried_again_as_often_as_a_stage(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command(site.parent / "bin" / "scontrol", f'echo "$*" >>{site}; echo "JobState=RUNNING PreemptTime=None"')
    data = next(job for job in chain(curriculum(), tmp_path) if job.name == "data")
    ledger = Ledger(tmp_path / "ledger.jsonl")
    # Its time is up, its node is lost, Ray's head dies twice.
    for code in (138, None, 1, 1):
        one = Attempt(tmp_path, data, None, 7)
        assert one.begin()
        if code is not None:
            one.end(ledger.attempts("data"), None, code, [signal.SIGUSR1] if code == 138 else [])
    ends = [(event.outcome, event.reason) for event in ledger.of("data") if event.event == "ended"]
    assert [outcome for outcome, _ in ends] == ["saved", "crashed", "crashed", "crashed"]
    assert "near its time limit" in ends[0][1]
    assert "lost with its node" in ends[1][1]
    assert site.read_text().count("requeue 7") == 2
    # One that failed for good is not.
    assert Attempt(tmp_path, data, None, 7).end(4, None, 78) == 78
    assert site.read_text().count("requeue 7") == 2


def test_commands_of_slurm_without_a_cluster_are_no_slurm(site: Path):
    said = "squeue: fatal: Could not establish a configuration source"
    command(site.parent / "bin" / "squeue", f"echo '{said}' >&2; exit 1")
    with pytest.raises(slurm.AbsentError):
        slurm.queue([7])
