"""Where a process finds itself must not change what it reads and writes, or whether it starts."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from wemmu.command_line import plainly

ROOT = Path(__file__).parents[1]
# Text of people in the places where it is kept, in a process whose locale knows ASCII alone.
FOREIGN = """
import locale, os, subprocess, sys
from pathlib import Path
from wemmu.config import dump, load_curriculum
from wemmu.jsonlines import read_lines
assert not locale.getpreferredencoding(False).upper().startswith("UTF"), "the test is of another locale"
folder = Path(sys.argv[1])
changes = ["sampling.prompts=[{text: caf\u00e9 \u732b}]"]
config = load_curriculum("configs/shapes/curriculum.yaml", changes)
dump(config, folder / "curriculum.yaml")
again = load_curriculum(folder / "curriculum.yaml")
assert again == config and again.sampling.prompts[0].text == "caf\u00e9 \u732b"
print(again.sampling.prompts[0].text)
child = [sys.executable, "-c", "open(__import__('sys').argv[1], 'w').write(chr(0x732b))", folder / "child.txt"]
subprocess.run(child, check=True)
assert (folder / "child.txt").read_bytes() == "\u732b".encode()
"""
# pwd as it is for a user id without an account.
NAMELESS = """
import pwd
def unknown(uid): raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = unknown
import wemmu
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
assert f"uid{__import__('os').getuid()}" in default_cache_dir()
"""


def run(folder: Path, program: str, *arguments: object, **environment: str) -> None:
    # Not by `-c`: the command line is in the encoding of the locale.
    (folder / "program.py").write_text(program, encoding="utf-8")
    known = {k: v for k, v in os.environ.items() if k not in ("USER", "LOGNAME", "LNAME", "USERNAME")}
    done = subprocess.run(
        [sys.executable, folder / "program.py", *map(str, arguments)],
        cwd=ROOT,
        env=known | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")


def test_text_is_utf8_in_a_locale_that_is_not(tmp_path: Path) -> None:
    run(tmp_path, FOREIGN, tmp_path, LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")


def test_names_of_files_are_utf8_in_a_locale_that_is_not(tmp_path: Path) -> None:
    """A folder of images with such names, written as a data set and verified."""
    folder = tmp_path / "caf\u00e9"
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "\u732b.png")
    (folder / "list.jsonl").write_text('{"image": "\u732b.png", "caption": "\u732b"}\n', encoding="utf-8")
    source = f"{{kind: folder, name: mine, path: {folder / 'list.jsonl'}}}"
    curriculum = tmp_path / "mine.yaml"
    text = f"base: {ROOT}/configs/shapes/curriculum.yaml\n"
    text += f"data: {{shards: {folder / 'out'}, prepare: {{sources: [{source}]}}}}\n"
    only_words = [f"'stages.stage{number}.mixture={{t2i: 1.0}}'" for number in range(1, 5)]
    curriculum.write_text(text + f"overrides: [{', '.join(only_words)}]\n", encoding="utf-8")
    foreign = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "data_pipeline", "write", str(curriculum), "--workers", "0"]
    done = subprocess.run(command, cwd=ROOT, env=foreign, capture_output=True, check=False)
    assert b"1 records read, 1 kept" in done.stdout, done.stdout + done.stderr


def test_a_user_without_a_name_can_work(tmp_path: Path) -> None:
    run(tmp_path, NAMELESS)


def test_a_file_system_that_needs_somebody_is_a_sentence_and_other_faults_stay_what_they_are(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught, plainly(), open("/dev/full", "w", encoding="utf-8") as file:
        file.write("x")
    assert caught.value.code == 78
    with pytest.raises(SystemExit), plainly():
        Path("/sys/wemmu").mkdir()
    full, closed = capfd.readouterr().err.splitlines()
    assert "No space left on device" in full
    assert "'/sys/wemmu'" in closed
    with pytest.raises(ConnectionResetError), plainly():
        raise ConnectionResetError
    with pytest.raises(ValueError, match="invalid literal"), plainly():
        json.loads("[1]", parse_int=lambda _: int("x"))


def _unspecified(file: Path) -> Iterator[int]:
    """Lines that open text in whatever encoding the locale has; ruff's PLW1514 sees only some of them."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(k.arg == "encoding" for k in node.keywords):
            continue
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if method else getattr(node.func, "id", None)
        modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        modes += [ast.unparse(k.value).strip("'") for k in node.keywords if k.arg == "mode"]
        opens = name in ("open", "fdopen") and any(set(m) <= set("rwax+t") for m in modes)
        opens |= name == "open" and (not node.args or not method) and not any("b" in m for m in modes)
        as_text = any(k.arg in ("text", "universal_newlines") and ast.unparse(k.value) == "True" for k in node.keywords)
        if opens or as_text or name in ("read_text", "write_text"):
            yield node.lineno


@pytest.mark.parametrize("room", ["wemmu", "launcher", "data_pipeline", "tools", "benchmarks"])
def test_every_text_file_is_opened_as_utf8(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    assert [f"{file.relative_to(ROOT)}:{line}" for file in files for line in _unspecified(file)] == []
