"""`verify` finds every kind of damage, says where it is, and the way out that it names is one."""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFilter
from rich.console import Console
from typer.testing import CliRunner

from data_pipeline import partitions
from data_pipeline.__main__ import app
from data_pipeline.chain import columns_of
from data_pipeline.records import WorkerError
from data_pipeline.verify import verify
from data_pipeline.verify_shard import record_problems
from tests.data_pipeline.worlds import SHAPES, curriculum_of, write_in_process
from tests.patience import eventually
from wemmu.command_line import FAILED, exit_code
from wemmu.config import Curriculum
from wemmu.config.shards import DataSet, LatentSettings, ShardError, StreamSettings, checksum, pack
from wemmu.config.task import Task
from wemmu.locks import is_alive
from wemmu.shapes.edits import random_edit
from wemmu.shapes.render import render


def verified(root: Path, workers: int = 1) -> tuple[bool, str]:
    console = Console(file=io.StringIO(), soft_wrap=True, markup=False, highlight=False)
    return verify(root, console, workers).whole, console.file.getvalue()


def a_shard(root: Path) -> Path:
    """A shard of the second partition."""
    return min(root.glob("*/*/*/00001/*.mds"))


def test_a_whole_data_set_is_told_by_its_size(written: Curriculum) -> None:
    whole, text = verified(written.data.shards)
    assert whole
    streams = DataSet.at(written.data.shards).streams
    assert f"{sum(s.samples for s in streams)} records" in text
    assert f"{len(streams)} streams" in text
    assert f"{sum(s.bytes for s in streams) / 1e6:,.1f} MB" in text


@pytest.mark.slow
def test_processes_find_what_one_finds_in_the_same_order(copied: Curriculum) -> None:
    for shard in list(copied.data.shards.glob("*/*/*/*/*.mds"))[::3]:
        flip(shard, -5)
    alone, parallel = (verified(copied.data.shards, workers)[1].splitlines()[:-1] for workers in (1, 2))
    assert len(alone) > 4
    assert [line for line in parallel if line] == [line for line in alone if line]


# Checks a shard many times on two processes, whose ids it prints.
MANY = """
import multiprocessing, sys
from pathlib import Path
from data_pipeline.contents import look, shard_files
from data_pipeline.verify import Check, _in_order
root = Path(sys.argv[1])
stream = look(root).streams[0]
check = Check(root, stream.settings, name := shard_files(stream)[0], stream.files[name], None)
for number, _ in enumerate(_in_order([check] * 5_000, 2)):
    if number in (0, 200):
        print(*(one.pid for one in multiprocessing.active_children()), flush=True)
"""


@pytest.mark.slow
def test_workers_leave_ctrl_c_to_the_command_and_end_when_it_is_killed(written: Curriculum) -> None:
    command = [sys.executable, "-c", MANY, str(written.data.shards)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as process:
        assert process.stdout is not None
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker, signal.SIGINT)
        assert process.stdout.readline(), "they went on"
        process.kill()
        eventually(lambda: not any(map(is_alive, workers)), lambda: workers)


# ------------------------------------------------------------------------------------------------------- swapped edits
def edits_of(directory: Path, blur: float) -> Path:
    """Edits of scenes that add or remove an object; all targets are blurred, as those of a generator may be."""
    directory.mkdir()
    lines = []
    for number in range(48):
        edit = random_edit(random.Random(number), "train", ("add", "remove")[number % 2])
        image, target = (render(scene, 64) for scene in (edit.sources[0], edit.target))
        image.save(directory / f"{number}-before.png")
        target.filter(ImageFilter.GaussianBlur(blur)).save(directory / f"{number}-after.png")
        instruction = ("Add it", "Remove it")[number % 2]
        lines.append({"instruction": instruction, "before": f"{number}-before.png", "after": f"{number}-after.png"})
    (directory / "edits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory / "edits.jsonl"


@pytest.mark.parametrize("blur", [0, 0.7])
def test_inputs_and_targets_that_are_swapped_are_suspected_by_what_add_and_remove_do(
    tmp_path: Path, blur: float
) -> None:
    path, said = str(edits_of(tmp_path / "raw", blur)), {}
    for name, fields in {"right": ("before", "after"), "swapped": ("after", "before")}.items():
        source = {"kind": "edits", "name": "mine", "path": path, "input": fields[0], "target": fields[1]}
        mixture, images = {"edit": 1.0}, {"unit": 16, "max_aspect": 1.0}
        write_in_process(curriculum_of(tmp_path / name, [source], mixture=mixture, images=images, partition=100))
        whole, said[name] = verified(tmp_path / name)
        assert whole
    assert "look swapped" not in said["right"]
    assert "source mine: its inputs and targets look swapped" in said["swapped"]
    assert "threshold 1e-04" in said["swapped"]


# ---------------------------------------------------------------------------------------------------- damage on disk
def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "a flipped byte in a record": (lambda path: flip(path, -5), ("its sha256 is", "its checksum differs")),
    "a flipped byte in the header": (lambda path: flip(path, 1), ("its sha256 is", "its header speaks of")),
    "a cut shard": (truncate, ("its sha256 is", "it is cut off")),
    "an empty shard": (lambda path: path.write_bytes(b""), ("is empty",)),
    "a missing shard": (Path.unlink, ("No such file",)),
    "a pipe in its place": (lambda path: (path.unlink(), os.mkfifo(path)), ("is not a file",)),
    "a device in its place": (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), ("is not a file",)),
    "a folder in its place": (lambda path: (path.unlink(), path.mkdir()), ("is not a file",)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_a_shard_is_found_and_the_way_out_mends_it(copied: Curriculum, damage: str) -> None:
    root = copied.data.shards
    shard = a_shard(root)
    before = shard.read_bytes()
    do, words = DAMAGES[damage]
    do(shard)
    whole, text = verified(root)
    assert not whole
    lines = [line for line in text.splitlines() if str(shard) in line]
    for word in words:
        assert any(word in line for line in lines), text
    remedy = lines[0].partition("to write it again, delete ")[2].partition(" and run ")[0]
    for name in remedy.split(", "):
        path = Path(name)
        # An empty remedy is the working directory.
        assert path.is_relative_to(root), lines[0]
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_in_process(copied)
    assert shard.read_bytes() == before
    assert verified(root)[0]


@pytest.mark.parametrize("content", [b"\xff{}", b"null", b"[]", b"", b'{"prepare": 1}'])
@pytest.mark.parametrize("name", ["settings.json", "dataset.json"])
def test_a_record_of_the_data_set_that_is_none_is_told(copied: Curriculum, name: str, content: bytes) -> None:
    file = copied.data.shards / name
    file.write_bytes(content)
    with pytest.raises(ShardError, match=re.escape(f"{file} is not of this version")):
        verify(copied.data.shards, Console(quiet=True))


def test_a_damaged_record_of_the_data_set_is_made_anew_from_the_ledger(copied: Curriculum) -> None:
    file = copied.data.shards / "dataset.json"
    before = file.read_bytes()
    file.write_bytes(before[:-1])
    with pytest.raises(ShardError, match=re.escape(f"if it is damaged, delete {file} and run `wemmu data write")):
        verify(copied.data.shards, Console(quiet=True))
    file.unlink()
    write_in_process(copied)
    assert file.read_bytes() == before


@pytest.mark.parametrize("field", ["basename", "bytes", "hashes"])
def test_an_entry_of_the_ledger_that_lacks_a_field_counts_as_none(copied: Curriculum, field: str) -> None:
    root = copied.data.shards
    file = root / "ledger" / "00001.json"
    before = {path: path.read_bytes() for path in (file, root / "dataset.json", a_shard(root))}
    edit_json(file, lambda entry: entry["streams"][0]["shards"][0]["raw_data"].pop(field))
    assert f"{file}: it is missing or cannot be read" in verified(root)[1]
    (root / "dataset.json").unlink()
    write_in_process(copied)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("when", ["before the first shard", "while they read"])
def test_a_reading_process_that_is_killed_is_a_sentence(
    copied: Curriculum, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def kill_one(*_: object, **__: object) -> ProcessPoolExecutor:
        pool = ProcessPoolExecutor(2, get_context("spawn"))
        killed = pool.submit(os.kill, pool.submit(os.getpid).result(), signal.SIGKILL)
        if when == "before the first shard":
            killed.exception()
        return pool

    monkeypatch.setattr("data_pipeline.verify.ProcessPoolExecutor", kill_one)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(WorkerError, match=r"a reading process ended.*--workers 1") as raised:
        verified(copied.data.shards, workers=2)
    assert exit_code(raised.value) == FAILED
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before, "a later Ctrl-C would be lost"


def test_damage_in_a_record_is_told_with_its_number(copied: Curriculum) -> None:
    shard = a_shard(copied.data.shards)
    flip(shard, -5)
    last = int.from_bytes(shard.read_bytes()[:4], "little") - 1
    assert f"{shard}, record {last}: its checksum differs" in verified(copied.data.shards)[1]


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def test_an_index_that_is_missing_or_was_changed_is_found(copied: Curriculum) -> None:
    indices = sorted(copied.data.shards.glob("*/*/*/index.json"))
    indices[0].unlink()
    indices[1].write_text("{")
    edit_json(indices[2], lambda tree: tree["shards"].pop())
    _, text = verified(copied.data.shards)
    assert f"{indices[0]}: it is missing" in text
    assert f"{indices[1]}: it cannot be read" in text
    for what in ("its sha256 is", "names other shards than dataset.json", "dataset.json says", "records of 0"):
        assert any(f"{indices[2]}: " in line and what in line for line in text.splitlines()), what
    (copied.data.shards / "dataset.json").unlink()
    write_in_process(copied)
    assert verified(copied.data.shards)[0]


def test_a_ledger_that_disagrees_with_the_index_is_found(copied: Curriculum) -> None:
    root = copied.data.shards

    def one_more(entry: dict[str, Any]) -> None:
        entry["streams"][0]["shards"][0]["samples"] += 1

    edit_json(root / "ledger" / "00001.json", one_more)
    whole, text = verified(root)
    assert not whole
    assert "records of 00001/shard.00000.mds, the ledger" in text
    (root / "ledger" / "00002.json").unlink()
    (root / "ledger" / "00003.json").write_text("{")
    _, text = verified(root)
    for number in (2, 3):
        assert f"{root / 'ledger' / f'0000{number}.json'}: it is missing or cannot be read" in text


def test_a_list_of_rejected_records_that_lacks_one_is_found(copied: Curriculum) -> None:
    path = copied.data.shards / "rejected.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    assert "it lists 2 records, the ledger 3" in verified(copied.data.shards)[1]


# -------------------------------------------------------------------------------- what a faulty writer would have made
def spoilt(shards: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[bool, str]:
    """Verify a data set whose every file is as recorded, but of which one record was written with these columns."""

    def spoil(sample: Any, source: str) -> dict[str, Any]:
        columns = columns_of(sample, source)
        if sample.columns["id"] == "edit/3" and sample.stream.resolution == 32:
            columns = {**columns, **{name: change(columns) for name, change in changes.items()}}
            columns["checksum"] = checksum(columns)
        return columns

    monkeypatch.setattr(partitions, "columns_of", spoil)
    write_in_process(curriculum_of(shards, [SHAPES]))
    return verified(shards)


@pytest.mark.parametrize(
    ("column", "change", "expected"),
    [
        ("target", lambda c: image(48, 32), "an image is 48 x 32 px (height x width) in a stream of 32 x 32 px"),
        ("target", lambda c: c["target"][:40], "an image cannot be decoded"),
        ("images", lambda c: pack([image(32, 64)]), "an image is 32 x 64 px"),
        ("images", lambda c: pack([]), "0 input images in a stream of 1"),
        ("task", lambda c: "t2i", "it has the task t2i in a stream of edit"),
        ("task", lambda c: "none", "columns are not of this layout"),
        ("latents", lambda c: pack([b"12"]), "latents have [2] bytes, not []"),
        ("id", lambda c: "shapes/edit/2", "its id shapes/edit/2 is also that of"),
    ],
)
def test_a_record_that_was_written_wrong_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str, change: Callable, expected: str
) -> None:
    whole, text = spoilt(tmp_path, monkeypatch, **{column: change})
    assert not whole
    (line,) = [line for line in text.splitlines() if expected in line]
    assert "edit/32/32x32/00005/shard.00000.mds, record 3: " in line


def image(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def test_ids_may_repeat_between_streams_but_not_between_partitions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, text = spoilt(tmp_path, monkeypatch, id=lambda c: "shapes/edit/12")
    assert not whole
    assert "00006/shard.00000.mds, record 5: its id shapes/edit/12 is also that of" in text


def test_latents_must_be_one_for_the_target_and_each_input() -> None:
    latents = LatentSettings(vae="x", scaling_factor=1.0, dtype="bfloat16", channels=2, rows=1, columns=1)
    settings = StreamSettings(task=Task.EDIT, resolution=32, height=32, width=32, inputs=1, latents=latents)

    def problems(*lengths: int, target: bytes = image(32, 32)) -> list[str]:
        columns = {
            "id": b"a",
            "task": b"edit",
            "prompt": b"",
            "answer": b"",
            "images": pack([image(32, 32)]),
            "target": target,
            "latents": pack([bytes(length) for length in lengths]),
        }
        return record_problems({**columns, "checksum": checksum(columns)}, settings)

    assert problems(4, 4) == []
    assert problems(0, 4, target=b"") == []
    for wrong in [(), (4,), (4, 3), (0, 4), (4, 4, 4)]:
        assert any("latents" in what for what in problems(*wrong)), wrong


# ------------------------------------------------------------------------------------------------------- unfinished
def test_an_unfinished_data_set_is_called_that_and_what_is_there_is_checked(copied: Curriculum) -> None:
    root = copied.data.shards
    (root / "dataset.json").unlink()
    (root / "ledger" / "00000.json").unlink()
    whole, text = verified(root)
    assert not whole
    assert "is incomplete" in text
    assert "every file that is there is whole" in text
    flip(a_shard(root), -5)
    assert "its checksum differs" in verified(root)[1]


def test_the_exit_code_tells(copied: Curriculum) -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["verify", str(copied.data.shards)]).exit_code == 0
    flip(a_shard(copied.data.shards), -5)
    result = runner.invoke(app, ["verify", str(copied.data.shards)])
    assert result.exit_code == 1
    assert "its checksum differs" in result.output
    result = runner.invoke(app, ["verify", str(copied.data.shards), "--json"])
    said = json.loads(result.stdout)
    assert (result.exit_code, said["whole"], said["complete"]) == (1, False, True)
    assert {problem["file"] for problem in said["problems"]} == {str(a_shard(copied.data.shards))}
    assert "its checksum differs" in result.stderr
