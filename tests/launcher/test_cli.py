"""What a person sees: plan, refusals, status."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launcher import folder
from launcher.cli import app
from launcher.cluster import Cluster
from launcher.ledger import Event, Ledger
from launcher.plan import chain
from launcher.slurm import Queued
from launcher.status import statuses
from tests.launcher.test_plan import curriculum, ended, rising, written
from wemmu import show_config
from wemmu.command_line import FINAL
from wemmu.config import Curriculum, dump


@pytest.fixture
def runnable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Curriculum:
    """A curriculum that passes every check, in a working directory of its own, as x.yaml."""
    monkeypatch.chdir(tmp_path)
    for backbone in ("vlm", "sana"):
        (tmp_path / backbone).symlink_to(Path(__file__).parents[2] / "assets/shapes" / backbone)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/manifest.json").touch()
    dump(curriculum(), tmp_path / "x.yaml")
    return curriculum()


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_the_launcher_loads_without_the_heavy_libraries():
    heavy = "{'torch', 'transformers', 'ray', 'numpy'}"
    code = f"import sys, launcher.cli; sys.exit(str({heavy} & set(sys.modules) or ''))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""


def test_a_dry_run_shows_the_plan_and_writes_nothing(runnable: Curriculum, tmp_path: Path):
    before = set(tmp_path.rglob("*"))
    result = call("run", "x.yaml", "--dry-run", "--set", "stages.b.steps=71")
    assert result.exit_code == 0
    for shown in ("32 px", "4 x 1", "71", "step_00000030", "backbones", "elsewhere"):
        assert shown in result.output
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["run", "check", "show"])
def test_a_part_that_begins_at_random_and_never_learns_is_told(runnable: Curriculum, command: str):
    def told(*overrides: str) -> str:
        given = [word for override in overrides for word in ("--set", override)]
        if command == "run":
            return call("run", "x.yaml", "--dry-run", *given).stderr
        return CliRunner().invoke(show_config.app, [command, "x.yaml", *given]).stderr

    assert told().count("no stage trains vae_branch, position_mlp, and nothing pre-trained brings it") == 1
    assert "no stage trains position_mlp, and" in told("recipe.bridge.vae_branch=false")
    assert "it stays random" not in told("stages.d.trains=[vae_branch, position_mlp]")
    assert "it stays random" not in told("stages.a.start=elsewhere")
    # So is an option that nothing uses.
    assert (
        told("recipe.bridge.queries.number=3").count("queries.number changes nothing, because the design is noisy") == 1
    )


def test_what_is_missing_is_refused_before_anything_starts(runnable: Curriculum, tmp_path: Path):
    (tmp_path / "sana").unlink()
    (tmp_path / "elsewhere/manifest.json").unlink()
    result = call("run", "x.yaml")
    assert result.exit_code == FINAL
    for wrong in ("sana/transformer", "stages.c.start: elsewhere"):
        assert wrong in result.stderr
    assert not (tmp_path / "runs").exists()


def test_a_changed_config_is_refused_and_the_run_is_not_touched(runnable: Curriculum, tmp_path: Path):
    run = written(runnable, tmp_path / "runs" / "x")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    result = call("run", "x.yaml", "--set", "stages.*.global_batch=8")
    assert result.exit_code == FINAL
    assert "stages.c.global_batch: 4 -> 8" in result.stderr
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_a_stage_that_no_data_serves_is_refused_by_every_command(runnable: Curriculum, tmp_path: Path, site: str):
    edit = ("--set", "stages.c.mixture={edit: 1.0}")
    run = written(runnable, tmp_path / "runs" / "x")
    dump(Cluster(name="site"), run / folder.CLUSTER)
    for command in (("run", "x.yaml"), ("run", "x.yaml", "--dry-run"), ("submit", "x.yaml", "--cluster", site)):
        result = call(*command, *edit, "--out", "other")
        assert (result.exit_code, "has records for c: edit at 32 px" in result.stderr) == (FINAL, True), command
    # Of what was begun this is a change, which is refused before the data is looked for.
    result = call("resume", str(run), *edit)
    assert (result.exit_code, "stages.c.mixture" in result.stderr) == (FINAL, True), result.stderr
    assert not (tmp_path / "other").exists()


def test_a_submission_warns_of_a_stage_that_its_gpus_cannot_hold(runnable: Curriculum, tmp_path: Path):
    dump(Cluster(name="site", gpu="h100"), tmp_path / "site.yaml")
    # So many at once that 80 GB do not hold what is kept of them.
    many = ("--set", "memory.micro_batch=4000000", "--set", "stages.c.global_batch=4000000")
    for overrides, warned in (((), False), (many, True)):
        result = call("submit", "x.yaml", "--cluster", "site.yaml", "--dry-run", *overrides)
        assert result.exit_code == 0, result.output
        assert ("warning: GPU memory of the plan: c needs" in result.stderr) == warned


def test_an_invalid_override_is_refused_with_the_choices(runnable: Curriculum):
    result = call("run", "x.yaml", "--set", "stages.z.steps=1")
    assert result.exit_code == FINAL
    assert "valid choices: a, b, c, d" in result.stderr


def test_the_name_of_a_folder_is_shown_as_it_is_and_quoted_in_commands(runnable: Curriculum, tmp_path: Path):
    run = Path("[red] it's [v1]")
    assert f"in {run}" in call("run", "x.yaml", "--dry-run", "--run", str(run)).stdout
    written(runnable, tmp_path / run)
    assert f"wemmu logs {shlex.quote(str(run))} JOB" in " ".join(call("status", str(run)).stdout.split())


def test_status_tells_each_kind_of_job_apart(runnable: Curriculum, tmp_path: Path):
    run = written(runnable, tmp_path / "run")
    [manifest] = chain(runnable, run)[1].products
    manifest.parent.mkdir(parents=True)
    manifest.write_text(f'{{"step": {int(manifest.parent.name[-8:])}}}')
    ledger = Ledger(run / "ledger.jsonl")
    ledger.append(Event("a", 1, "started", 1))
    ledger.append(Event("a", 1, "ended", 1, 0, 0, 30, "finished"))
    ledger.append(Event("b", 1, "started", 1))
    ledger.append(Event("b", 1, "ended", 1, 75, 0, 20, "was interrupted and saved its state"))
    # No process has this id: the kernel's highest is 2^22.
    ledger.append(Event("c", 1, "started", 2**30))
    logged = "".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in (10, 20))
    (run / "b" / "metrics.jsonl").write_text(logged + '{"step": 30, "lo')

    lines = {line.split()[0]: line for line in call("status", str(run)).output.splitlines()}
    assert "finished" in lines["a"]
    assert "30/30" in lines["a"]
    assert "was interrupted" in lines["b"]
    assert "0.0500" in lines["b"]
    assert "interrupted: its launcher" in lines["c"]
    assert "waiting" in lines["d"]
    assert "waiting" in lines["report"]


@pytest.fixture
def site(tmp_path: Path) -> str:
    dump(Cluster(name="site", partition="gpu", ranks_per_node=1), tmp_path / "site.yaml")
    return "site.yaml"


def test_a_dry_run_of_a_submission_shows_plan_commands_and_all_that_is_wrong(
    runnable: Curriculum, tmp_path: Path, site: str
):
    for backbone in ("vlm", "sana"):
        (tmp_path / backbone).unlink()
        (tmp_path / backbone).mkdir()
    before = set(tmp_path.rglob("*"))
    result = call("submit", "x.yaml", "--cluster", site, "--dry-run")
    assert result.exit_code == FINAL
    for shown in ("step_00000030", "# b, after a", "--partition=gpu", "slurm/stage.sh"):
        assert shown in result.output
    # The backbones are empty directories, which only a look inside tells.
    for wrong in ("backbones: vlm/config.json is needed", "cannot run here"):
        assert wrong in result.stderr
    assert set(tmp_path.rglob("*")) == before


def test_a_submission_needs_to_know_the_cluster(runnable: Curriculum):
    result = call("submit", "x.yaml")
    assert result.exit_code == 2
    assert "submit needs a cluster file: --cluster" in result.stderr


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("submit x.yaml --cluster c.yaml --dry-run --json", "--dry-run submits none"),
        ("status runs/x --watch --json", "leave out one"),
        ("resume runs/x --json", "runs/x continues on this machine; leave it out"),
    ],
)
def test_json_is_refused_where_there_is_none(runnable: Curriculum, tmp_path: Path, command: str, said: str):
    written(runnable, tmp_path / "runs" / "x")
    result = call(*command.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


def test_a_run_folder_that_cannot_be_made_is_refused_before_anything_starts(runnable: Curriculum, tmp_path: Path):
    (tmp_path / "file").write_text("x")
    for name, reason in (("file/run", "file is a file"), ("file", "exists and is not a run folder")):
        result = call("run", "x.yaml", "--dry-run", "--run", name)
        assert result.exit_code == FINAL, result.output
        assert reason in result.stderr
        # Before the checks that may measure the model.
        result = call("run", "x.yaml", "--dry-run", "--run", name, "--set", "backbones.vlm=nowhere")
        assert reason in result.stderr
        assert "nowhere" not in result.stderr


def test_data_that_cannot_be_written_is_refused_before_anything_starts(runnable: Curriculum, tmp_path: Path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/file").write_text("x")
    for name, reason in (("notes", "notes is not empty and not a data set"), ("notes/file/shards", "file is a file")):
        result = call("run", "x.yaml", "--dry-run", "--set", f"data.shards={name}")
        assert result.exit_code == FINAL, result.output
        assert reason in result.stderr


def test_what_lies_in_a_run_is_answered_with_the_run(runnable: Curriculum, tmp_path: Path):
    written(runnable, tmp_path / "runs" / "x")
    for given in ("runs/x/a", "runs/x/curriculum.yaml"):
        assert "has no curriculum.yaml; did you mean runs/x? " in call("status", given).stderr
        assert "has no curriculum.yaml; did you mean runs/x? " in call("logs", given).stderr
    assert "in runs/: runs/x" in call("status", "absent").stderr
    assert "runs/x: there is no job 'absent'" in call("logs", "absent").stderr


def test_an_attempt_outside_of_a_slurm_job_is_refused(runnable: Curriculum, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    result = call("attempt", "a")
    assert result.exit_code == FINAL
    assert "wemmu run CURRICULUM" in result.stderr


def test_the_log_of_a_job(runnable: Curriculum, tmp_path: Path):
    run = written(runnable, tmp_path / "run")
    assert call("logs", str(run), "b").exit_code == 1
    (run / "b" / "log.txt").write_text("step 1\n")
    assert call("logs", str(run), "b").output == "step 1\n"
    assert "valid choices: data, a, a/evaluation, b" in call("logs", str(run), "z").stderr
    # Without a job the log that was written last, without a run the newest below runs/.
    assert call("logs", str(run)).output == "step 1\n"


def test_without_a_run_the_newest_is_shown(runnable: Curriculum, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert "contains none; give one" in call("status").stderr
    for number, name in enumerate(("later", "earlier")):
        run = written(runnable, tmp_path / "runs" / name)
        (run / "b" / "log.txt").write_text(f"of {name}\n")
        os.utime(run / folder.CURRICULUM, (1000 - number, 1000 - number))
    assert call("logs").output == call("logs", "b").output == "of later\n"
    rows = json.loads(call("status", "--json").output)
    assert [row["job"] for row in rows] == [job.name for job in chain(runnable, tmp_path / "runs" / "later")]
    assert "runs/later" in call("status").output


def queued(**states: str) -> dict[str, Queued]:
    return {name: Queued(number, *state.split("/"), "n1") for number, (name, state) in enumerate(states.items(), 7)}


def test_status_of_jobs_that_slurm_has(runnable: Curriculum, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    lines = ["JobState=CANCELLED", "JobState=FAILED ExitCode=1:0 StdOut=/shared/report.log"]
    answers = f"case $4 in 7) echo {lines[0]};; 8) echo {lines[1]};; esac"
    scontrol.write_text(f"#!/bin/bash\n{answers}\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    run = written(runnable, tmp_path / "run")
    ledger = Ledger(run / "ledger.jsonl")
    for name in ("data", "a", "b", "c", "d", "export"):
        ledger.append(Event(name, 0, "submitted", slurm=7))
    ledger.append(Event("report", 0, "submitted", slurm=8))
    ledger.append(Event("d", 1, "started", slurm=7, from_step=0))
    metrics = {"step": 10, "samples": 40, "loss": 0.5, "samples_per_s": 8.0}
    (run / "a" / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    jobs = queued(a="RUNNING/None", b="PENDING/Dependency", c="PENDING/Priority")
    said = {row.job: row for row in statuses(chain(runnable, run), ledger, jobs)}
    assert said["a"].state == "running on n1, job 7"
    # 20 steps of 4 samples at 8 a second.
    assert (said["a"].step, said["a"].seconds_left) == (10, 10.0)
    assert said["b"].state == "waits for a"
    assert said["c"].state == "queued behind other jobs, job 9"
    assert said["d"].state == "lost: Slurm no longer has job 7"
    assert said["export"].state == "cancelled: a job it waited for did not finish"
    early = "failed before its attempt began: FAILED, exit code 1:0; its log: /shared/report.log"
    assert said["report"].state == early


def test_a_dry_run_shows_what_each_resolution_of_a_stage_is(runnable: Curriculum, tmp_path: Path):
    dump(rising(), tmp_path / "rising.yaml")
    result = call("run", "rising.yaml", "--dry-run", "--set", "memory.micro_batch=4")
    assert result.exit_code == 0
    row = {line.split()[0]: line.split() for line in result.output.splitlines() if line.strip()}
    assert row["resolution"][1:] == ["32", "px", "32", "px", "48", "px", "64", "px", "32", "px", "32", "px"]
    assert " ".join(row["batch"][1:]) == "4 x 1 4 x 1 1 x 4 1 x 4 4 x 1 4 x 1"
    assert " ".join(row["steps"][1:]) == "30 0 to 10 10 to 20 20 to 70 30 30"


def test_status_has_a_line_for_each_resolution(runnable: Curriculum, tmp_path: Path):
    run = written(rising(), tmp_path / "run")
    ended(run, 32, 8)
    (run / "b" / "checkpoints" / "step_00000012").mkdir()
    (run / "b" / "checkpoints" / "step_00000012" / "manifest.json").write_text('{"step": 12}')
    told = [{"step": 8, "loss": 0.5}, {"step": 8, "validation_loss": 3.0}, {"step": 12, "loss": 0.25}]
    (run / "b" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    ledger = Ledger(run / "ledger.jsonl")
    for name in ("b@32", "b@48"):
        ledger.append(Event(name, 1, "started", 1))
    ledger.append(Event("b@48", 1, "ended", 1, 75, 8, 12, "was interrupted and saved its state"))

    lines = {line.split()[0]: line for line in call("status", str(run)).output.splitlines()}
    assert "finished" in lines["b@32"]
    assert "8/8" in lines["b@32"]
    assert "0.5000" in lines["b@32"]
    assert "was interrupted" in lines["b@48"]
    assert "12/20" in lines["b@48"]
    assert "0.2500" in lines["b@48"]
    assert "waiting" in lines["b@64"]
    assert "/" not in lines["b@64"]


def test_the_log_of_a_resolution_is_found_by_its_name(runnable: Curriculum, tmp_path: Path):
    run = written(rising(), tmp_path / "run")
    (run / "b" / "log-48.txt").write_text("what b@48 said")
    assert call("logs", str(run), "b@48").output == "what b@48 said"
    assert "valid choices: data, a, a/evaluation, b@32, b@48" in call("logs", str(run), "b@96").stderr


def test_a_folder_that_holds_no_run_is_not_cancelled(tmp_path: Path):
    result = call("cancel", str(tmp_path / "mistyped"))
    assert result.exit_code == FINAL
    assert "mistyped is not a run folder" in result.stderr


def test_a_folder_from_a_cluster_goes_on_without_slurm(
    runnable: Curriculum, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = written(runnable, tmp_path / "runs" / "x")
    Ledger(run / "ledger.jsonl").append(Event("a", 0, "submitted", slurm=7))
    monkeypatch.setenv("PATH", str(tmp_path))
    begun: list[object] = []
    monkeypatch.setattr("launcher.cli.local.run", lambda jobs, ledger, lock: begun.append(jobs) or 1)
    result = call("run", "x.yaml")
    assert len(begun) == 1, result.output
    assert "without Slurm here, the launcher cannot check for queued jobs of runs/x (a)" in result.stderr
    assert call("cancel", "runs/x").exit_code == 1
    # Without a cluster.yaml it has run here; with one `resume` goes to Slurm, unless it is told not to.
    call("resume", "runs/x")
    dump(Cluster(name="site", ranks_per_node=1), run / folder.CLUSTER)
    refused = call("resume", "runs/x")
    assert (refused.exit_code, "runs/x was submitted to Slurm; add --here" in refused.stderr) == (2, True)
    assert len(begun) == 2
    call("resume", "runs/x", "--here")
    assert len(begun) == 3
    assert "did you mean runs/x? run folders near it or in runs/: runs/x" in call("resume", "runs/X").stderr
