"""The command `wemmu`: nothing loads before it is needed, and every program is the one of the old ways."""

import errno
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

import data_pipeline.__main__ as data
import launcher.cli as launcher
from wemmu.__main__ import PROGRAMS, app, load
from wemmu.command_line import FINAL, exit_code, without_unused
from wemmu.config import dump, load_curriculum

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "diffusers", "streaming", "ray", "pyarrow", "scipy", "matplotlib"}


def loaded(*arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Run `wemmu` in a new process; returns what it said and the modules that it imported."""
    code = (
        "import sys, wemmu.__main__ as door\n"
        "try: door.main()\n"
        "finally: print('modules:', *sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *arguments]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done, set(done.stderr.rpartition("modules:")[2].split())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EISDIR, errno.EEXIST, errno.ELOOP])
def test_what_a_person_must_mend_on_a_disk_is_not_tried_again(number: int):
    """EFBIG: a limit on the size of files. EEXIST: a file where a folder must be."""
    assert exit_code(OSError(number, os.strerror(number))) == FINAL


def test_a_deleted_working_directory_is_named(tmp_path: Path):
    command = [sys.executable, "-P", "-m", "wemmu", "config", "check", str(ROOT / "configs" / "shapes" / "demo.yaml")]
    deleted = ["bash", "-c", 'cd "$0" && rmdir "$0" && exec "$@"', str(tmp_path), *command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(deleted, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == FINAL
    assert done.stderr == "the working directory was deleted or replaced: change to it again, or to another one\n"


def test_help_lists_every_program_and_imports_none():
    done, modules = loaded("--help")
    assert done.returncode == 0
    assert all(f" {name} " in done.stdout for name in PROGRAMS)
    rooms = {name for name in modules if name.partition(".")[0] in ("wemmu", "launcher", "data_pipeline", "tools")}
    assert rooms == {"wemmu", "wemmu.__main__", "wemmu.command_line"}
    assert not modules & {*HEAVY, "numpy", "pydantic", "omegaconf"}


def test_help_of_the_programs_imports_no_heavy_library():
    code = (
        "import sys, wemmu.__main__ as door\n"
        "for name in [*door.PROGRAMS, *sys.argv[1:]]:\n"
        "    sys.argv = ['wemmu', *name.split(), '--help']\n"
        "    try: door.main()\n"
        "    except SystemExit as end: assert end.code == 0, name\n"
        "print('modules:', *sys.modules)"
    )
    parts = [f"data {name}" for name in ("buckets", "write", "inspect", "verify")]
    parts += [f"config {name}" for name in ("show", "check")]
    command = [sys.executable, "-c", code, *parts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in (*PROGRAMS, *parts):
        assert f"Usage: wemmu {name} " in done.stdout
    assert not set(done.stdout.rpartition("modules:")[2].split()) & {*HEAVY, "numpy"}


def test_version_names_the_commit():
    done, modules = loaded("--version")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert done.stdout.startswith("wemmu 0.1.0 (")
    assert commit.strip() in done.stdout
    assert "pydantic" not in modules


def test_completion_imports_no_program():
    done, modules = loaded(_WEMMU_COMPLETE="complete_bash", COMP_WORDS="wemmu ex", COMP_CWORD="1")
    assert done.stdout.split() == ["export"]
    assert "launcher" not in modules


def test_a_program_unknown_is_refused_with_the_one_that_is_meant():
    result = CliRunner().invoke(app, ["exprt"])
    assert result.exit_code == 2
    assert "did you mean export? valid: data, " in " ".join(result.output.split())
    assert "valid: buckets, write, inspect, verify" in CliRunner().invoke(data.app, ["preview"]).output


def test_what_is_no_run_and_no_checkpoint_is_refused_before_the_models_load(tmp_path: Path):
    (stage := tmp_path / "run/a").mkdir(parents=True)
    config = ROOT / "configs/shapes/demo.yaml"
    dump(load_curriculum(config).stage_run("stage1"), stage / "config.yaml")
    (card := tmp_path / "run/a/evaluation/card.json").parent.mkdir()
    card.touch()
    no_checkpoint = ("evaluate", str(stage), "--checkpoint", str(tmp_path / "absent"))
    (empty := tmp_path / "empty").mkdir()
    below_a_file = str(card / "x")
    usage = ("--solver", "fidelty", below_a_file, "--tp")
    for command, said in (
        (("report", str(tmp_path)), f"{tmp_path} is not a run; "),
        (no_checkpoint, "is not a checkpoint: it has no manifest.json; "),
        (("ui", str(tmp_path)), f"{tmp_path} is not a run; "),
        (("sample", str(tmp_path), "--prompt", "x"), f"{tmp_path} is not a run; "),
        (("sample", str(stage), "--prompt", "x", "--solver", "hein"), "--solver hein is unknown; did you mean heun?"),
        (("compare", str(tmp_path), str(tmp_path)), f"{tmp_path} holds no result card (card.json); valid inside it: "),
        ((*no_checkpoint, "--benchmark", "shapes"), "is not a checkpoint: it has no manifest.json; "),
        (("evaluate", str(stage), "--benchmark", "fidelty"), "--benchmark fidelty is unknown; did you mean fidelity?"),
        (("evaluate", str(empty), "--benchmark", "fidelity"), f"{empty} is empty; valid: a run, "),
        (("evaluate", str(stage), "--benchmark", "shapes", "--out", below_a_file), f"{card} is a file; "),
        (("export", str(stage), "--out", below_a_file), f"{card} is a file; "),
        (("export", str(stage), "--ship", below_a_file), f"{card} is a file; "),
        (("doctor", str(tmp_path / "absent.yaml")), f"there is no {tmp_path / 'absent.yaml'}; "),
        (("plan", str(config), "--tp", "0"), "Invalid value for '--tp'"),
    ):
        done, modules = loaded(*command)
        assert done.returncode == (2 if {*usage} & {*command} else FINAL), command
        assert said in done.stderr
        assert not modules & HEAVY


def test_the_front_door_leads_to_the_programs_of_the_old_ways():
    """One function behind both ways."""
    commands = {command.callback.__name__: command.callback for command in launcher.app.registered_commands}
    for name, program in PROGRAMS.items():
        if program.module == "launcher.cli":
            assert load(name).callback.__wrapped__ is commands[name]
    data_commands = {command.callback.__name__ for command in data.app.registered_commands}
    assert set(load("data").commands) == data_commands == {"buckets", "write", "inspect", "verify"}


def test_the_docs_list_every_command_with_its_options():
    docs = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    table = docs.partition("## All options")[2].partition("\n## ")[0]
    rows = []
    for name in PROGRAMS:
        command = load(name)
        for part, one in getattr(command, "commands", {"": command}).items():
            options = [param for param in one.params if param.param_type_name == "option" and not param.hidden]
            listed = [f"`{'/'.join([*option.opts, *option.secondary_opts])}`" for option in options]
            rows.append(f"| `{f'{name} {part}'.strip()}` | {', '.join(listed) or 'none'} |")
    assert [line for line in table.splitlines() if line.startswith("| `")] == rows
    # The first table says what each command is for.
    assert all(f"| `wemmu {name}" in docs or f", `wemmu {name}" in docs for name in PROGRAMS)


@pytest.mark.slow
def test_both_ways_say_the_same_and_end_a_mistake_by_the_same_code_in_every_program(tmp_path: Path):
    """A file that is not there is a mistake of the config, an option that is not there one of the command line."""
    old = {
        "run": ["-m", "launcher", "run"],
        "status": ["-m", "launcher", "status"],
        "data write": ["-m", "data_pipeline", "write"],
        "plan": ["-m", "wemmu.plan"],
        "train": ["-m", "wemmu.train"],
        "sample": ["-m", "wemmu.sample"],
        "evaluate": ["-m", "wemmu.evaluate", "--prompts", "1"],
        "report": ["-m", "wemmu.report"],
        "export": [str(ROOT / "tools/convert_ckpt.py"), "--out", "pipeline"],
        "config check": [],
        "data verify": ["-m", "data_pipeline", "verify"],
    }

    def said(*words: str) -> tuple[int, str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr, words
        return done.returncode, done.stderr

    for name, words in old.items():
        new = ["-m", "wemmu", *name.split(), *(w for w in words if w in ("--prompts", "1", "--out", "pipeline"))]
        code, sentence = said(*new, "nowhere")
        assert (code, "nowhere" in sentence) == (78, True), (name, sentence)
        assert not words or said(*words, "nowhere") == (code, sentence), name
        assert said(*new, "nowhere", "--no-such-option")[0] == 2, name


def test_config_shows_where_each_value_comes_from_and_checks_without_running(tmp_path: Path):
    config = ["config", "show", str(ROOT / "configs/shapes/demo.yaml"), "--set", "stages.stage2.steps=900"]
    rows = {row["field"]: row for row in json.loads(CliRunner().invoke(app, [*config, "--json"]).stdout)}
    assert rows["stages.stage2.steps"] == {"field": "stages.stage2.steps", "value": 900, "from": "--set"}
    assert rows["stages.stage1.steps"]["from"].endswith("configs/shapes/demo.yaml (overrides)")
    assert rows["backbones.vlm"]["from"].endswith("configs/shapes/curriculum.yaml")
    assert rows["parallel.ranks"]["from"] == "default"
    # Every line can be given to --set again.
    lines = [line.rpartition("  # ")[0].rstrip() for line in CliRunner().invoke(app, config).stdout.splitlines()]
    again = [word for line in lines for word in ("--set", line)]
    assert json.loads(CliRunner().invoke(app, [*config[:3], *again, "--json"]).stdout) == [
        row | {"from": "--set"} for row in rows.values()
    ]
    (tmp_path / "bad.yaml").write_text("name: x")
    result = CliRunner().invoke(app, ["config", "check", f"{tmp_path}/bad.yaml", config[2], f"{tmp_path}/none.yaml"])
    assert result.exit_code == 78
    assert "demo.yaml: valid, stages stage1, stage2, stage3, stage4" in result.stdout
    assert "backbones: Field required" in result.stderr
    assert f"there is no {tmp_path}/none.yaml" in result.stderr


def test_scipy_is_hidden_while_a_command_imports_libraries_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "scipy", raising=False)
    with without_unused():
        assert find_spec("scipy") is None
    assert find_spec("scipy") is not None
