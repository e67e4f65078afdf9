"""Writing: what is planned, what is kept, what is refused, and in which words."""

import errno
import json
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from PIL import Image
from pydantic import TypeAdapter
from rich.console import Console
from streaming import LocalDataset

from data_pipeline.__main__ import main
from data_pipeline.images import decode
from data_pipeline.plan import Settings, plan
from data_pipeline.records import EncodedImage, Reason, Rejection, WorkerError
from data_pipeline.write import _only_writer, write
from tests.data_pipeline import broken
from tests.data_pipeline.test_faults import contents
from tests.data_pipeline.worlds import SHAPES, collection, curriculum_of, photograph, write_in_process
from wemmu.config import ConfigError, Curriculum, dump, load_curriculum
from wemmu.config.shards import DATASET_FILE, LEDGER, REJECTED_FILE, DataSet, ShardError
from wemmu.config.task import Task
from wemmu.locks import LockedError

QUIET = Console(file=StringIO())


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    """A finished data set of photographs and its sources; not to be changed."""
    root = tmp_path_factory.mktemp("photographs")
    sources = collection(root / "source")
    write_in_process(curriculum_of(root / "shards", sources))
    return root / "shards", sources


def rejected(root: Path) -> dict[str, str]:
    return {line["key"]: line["reason"] for line in map(json.loads, (root / REJECTED_FILE).read_text().splitlines())}


# ------------------------------------------------------------------------------------------------------------ plan
def test_every_task_at_every_resolution_in_use(tmp_path: Path) -> None:
    job = plan(curriculum_of(tmp_path, mixture={"edit": 1, "unconditional": 1}))
    assert job.resolutions == {Task.EDIT: (32, 64), Task.UNCONDITIONAL: (32, 64), Task.T2I: (32, 64)}


def test_every_task_at_every_resolution_of_a_stage(tmp_path: Path) -> None:
    several = {"resolution": [32, 48, 80], "next_resolution": {"samples": 40}}
    job = plan(curriculum_of(tmp_path, mixture={"edit": 1, "unconditional": 1}, also=["multi_edit"], **several))
    tasks = (Task.EDIT, Task.UNCONDITIONAL, Task.T2I, Task.MULTI_EDIT)
    assert job.resolutions == dict.fromkeys(tasks, (32, 48, 80))
    with pytest.raises(ConfigError, match=r"48 is not a multiple.*32 px"):
        plan(curriculum_of(tmp_path, images={"unit": 32}, **several | {"resolution": [32, 48, 64]}))


def test_a_curriculum_that_prepares_nothing_is_refused(tmp_path: Path) -> None:
    curriculum = curriculum_of(tmp_path)
    empty = curriculum.model_copy(update={"data": curriculum.data.model_copy(update={"prepare": None})})
    with pytest.raises(ConfigError, match=r"no data\.prepare"):
        plan(empty)


def test_a_resolution_that_is_no_multiple_of_the_unit_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"32 is not a multiple.*24 px.*24 and 48"):
        plan(curriculum_of(tmp_path, images={"unit": 24}))


# ----------------------------------------------------------------------------------------------- what comes out
def test_what_is_written_and_what_is_left_out(photographs: tuple[Path, list]) -> None:
    root, _ = photographs
    streams = {s.settings.name: s.samples for s in DataSet.at(root).streams}
    # 12 photographs, each at both resolutions, and as many edits.
    for task in ("t2i", "edit"):
        for resolution in (32, 64):
            assert sum(n for name, n in streams.items() if name.startswith(f"{task}/{resolution}/")) == 12
    assert len({name.split("/")[2] for name in streams}) > 2
    reasons = list(rejected(root).values())
    assert sorted(reasons) == sorted([Reason.TRUNCATED, Reason.NO_IMAGE, Reason.TOO_SMALL])


def test_the_same_again_whatever_the_partitions(photographs: tuple[Path, list], tmp_path: Path) -> None:
    """Two runs of the same command give the same bytes."""
    root, sources = photographs
    write_in_process(curriculum_of(tmp_path / "again", sources))
    assert contents(tmp_path / "again") == contents(root)


def test_duplicates_are_dropped_across_parts_and_sources(photographs: tuple[Path, list], tmp_path: Path) -> None:
    _, (photos, edits) = photographs
    twice = [photos, photos | {"name": "again"}, edits]
    dropped = write_in_process(curriculum_of(tmp_path / "drop", twice))
    kept = write_in_process(curriculum_of(tmp_path / "keep", twice, keep={"duplicates": "keep"}))
    counts = [sum(s.samples for s in d.streams if s.settings.name.startswith("t2i/64")) for d in (dropped, kept)]
    assert counts == [12, 24]
    # The same 12 photographs, the small one and the one that was cut.
    assert sum(reason == Reason.DUPLICATE for reason in rejected(tmp_path / "drop").values()) == 14
    # An instruction is part of an edit: the same images with another one are another record.
    assert sum(s.samples for s in dropped.streams if s.settings.name.startswith("edit/64")) == 12


def test_a_refused_caption_does_not_hide_the_same_image_with_a_good_one(tmp_path: Path) -> None:
    image = tmp_path / "source" / "cat.png"
    image.parent.mkdir()
    photograph("chelsea").save(image)
    captions = ("", "x" * 5000, "a cat", "a cat again")
    lines = "".join(json.dumps({"image": "cat.png", "text": text}) + "\n" for text in captions)
    image.with_name("cats.jsonl").write_text(lines)
    source = {"kind": "folder", "name": "cats", "path": str(image.with_name("cats.jsonl")), "caption": "text"}
    dataset = write_in_process(curriculum_of(tmp_path / "shards", [source, SHAPES]))
    cats = [
        sample["prompt"]
        for stream in dataset.streams
        if stream.settings.name.startswith("t2i/64/")
        for sample in LocalDataset(str(tmp_path / "shards" / stream.settings.name))
        if sample["id"].startswith("cats")
    ]
    assert cats == ["a cat"]
    assert sorted(rejected(tmp_path / "shards").values()) == sorted(
        [Reason.NO_CAPTION, Reason.CAPTION_TOO_LONG, Reason.DUPLICATE]
    )


def test_tasks_that_no_stage_mixes_are_written_when_asked_for(tmp_path: Path) -> None:
    image = tmp_path / "source" / "cat.png"
    image.parent.mkdir()
    photograph("chelsea").save(image)
    lines = [{"image": "cat.png", "question": "what is it?", "answer": "a cat"}]
    image.with_name("qa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"kind": "folder", "name": "qa", "path": str(image.with_name("qa.jsonl")), "caption": "question"}
    curriculum = curriculum_of(tmp_path / "shards", [source | {"answer": "answer"}, SHAPES], also=["understanding"])
    dataset = write_in_process(curriculum)
    names = [s.settings.name for s in dataset.streams if s.settings.task is Task.UNDERSTANDING]
    assert len(names) == 2
    (record,) = LocalDataset(str(tmp_path / "shards" / names[0]))
    assert (record["prompt"], record["answer"], record["target"]) == ("what is it?", "a cat", b"")
    # What nobody asked for is not there.
    assert not any(s.settings.task is Task.MULTI_EDIT for s in dataset.streams)


def test_drawings_are_never_duplicates(tmp_path: Path) -> None:
    dataset = write_in_process(curriculum_of(tmp_path))
    t2i = [s.samples for s in dataset.streams if s.settings.task is Task.T2I]
    assert t2i == [SHAPES["samples"]["t2i"]] * 2


# ------------------------------------------------------------------------------------- what is kept, what is refused
def test_a_complete_data_set_costs_no_heavy_import(tmp_path: Path) -> None:
    curriculum = curriculum_of(tmp_path / "shards")
    write_in_process(curriculum)
    dump(curriculum, tmp_path / "curriculum.yaml")
    before = contents(tmp_path)
    command = [sys.executable, "-X", "importtime", "-m", "data_pipeline", "write", str(tmp_path / "curriculum.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "is complete" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "wemmu.config" in imported
    assert not imported & {"ray", "streaming", "torch", "transformers", "datasets"}
    assert contents(tmp_path) == before


def test_the_command_refuses_in_words(
    photographs: tuple[Path, list], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    root, sources = photographs
    dump(curriculum_of(root, sources), tmp_path / "curriculum.yaml")
    change = "data.prepare.images.quality=7"
    monkeypatch.setattr(sys, "argv", ["data_pipeline", "write", str(tmp_path / "curriculum.yaml"), "--set", change])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 78
    assert "prepare.images.quality: 7, not 95" in capsys.readouterr().err


def test_a_data_set_of_an_earlier_version_has_the_same_settings(tmp_path: Path) -> None:
    settings = Settings.of(plan(curriculum_of(tmp_path, images={"unit": 16})))
    # A field that came later, at its default.
    assert "sizes" not in settings.prepare["sources"][0]
    earlier = settings.model_dump(mode="json")
    earlier["prepare"]["pictures"] = earlier["prepare"].pop("images")
    (tmp_path / "settings.json").write_text(json.dumps(earlier))
    assert Settings.load(tmp_path / "settings.json") == settings


def test_other_settings_are_refused_by_name_also_of_a_data_set_just_begun(
    photographs: tuple[Path, list], tmp_path: Path
) -> None:
    root, sources = photographs
    before = contents(root)
    for changed, words in (
        (curriculum_of(root, sources, partition=8), "prepare.partition: 8, not 7"),
        (curriculum_of(root, sources, mixture={"t2i": 1}), r"resolutions\.edit.* absent, not \[32, 64\]"),
        (curriculum_of(root, sources[:1]), r"sources\.1\.path: absent"),
    ):
        with pytest.raises(ShardError, match=words):
            write(changed, QUIET, workers=0)
    assert contents(root) == before
    # The share of damage that stops the job decides nothing about the records.
    write(curriculum_of(root, sources, max_damaged=0.4), QUIET, workers=0)


def test_a_source_that_changed_is_refused_by_a_run_that_goes_on(tmp_path: Path) -> None:
    sources = collection(tmp_path / "source", copies=2)
    curriculum = curriculum_of(tmp_path / "shards", sources)
    write_in_process(curriculum)
    (tmp_path / "shards" / DATASET_FILE).unlink()
    with (tmp_path / "source" / "photos.jsonl").open("a") as file:
        file.write('{"image": "coffee0.jpg", "caption": "one more"}\n')
    with pytest.raises(ShardError, match="have changed since writing began"):
        write(curriculum, QUIET, workers=0)


def test_a_directory_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ShardError, match="not empty and not a data set"):
        write(curriculum_of(tmp_path), QUIET, workers=0)
    assert contents(tmp_path) == {"thesis.tex": b"x"}


@pytest.mark.parametrize("error", [MemoryError, KeyError])
def test_an_error_that_ends_the_job_names_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def failing(image: EncodedImage, max_pixels: int) -> Image.Image:
        if image.name.startswith("chelsea"):
            raise error("x")
        return decode(image, max_pixels)

    monkeypatch.setattr("data_pipeline.chain.decode", failing)
    with pytest.raises(WorkerError if error is MemoryError else error) as raised:
        write_in_process(curriculum_of(tmp_path / "shards", collection(tmp_path / "source")[:1], mixture={"t2i": 1}))
    place = "in photos/photos.jsonl:8-14, at the record photos.jsonl/9"
    assert place in " ".join((str(raised.value), *getattr(raised.value, "__notes__", ())))
    assert not list((tmp_path / "shards").rglob("*.tmp"))


def with_latents(root: Path, source: Path, vae: Path) -> Curriculum:
    tree = curriculum_of(root, collection(source, copies=2)[:1], mixture={"t2i": 1}, partition=2).model_dump(
        mode="json"
    )
    tree["backbones"] = {"vlm": "nowhere", "dit": "nowhere", "vae": str(vae)}
    tree["data"]["prepare"]["latents"] = {"dtype": "bfloat16"}
    return Curriculum.model_validate(tree)


@pytest.mark.slow
def test_a_data_set_does_not_mix_latents_of_two_autoencoders(tmp_path: Path) -> None:
    mine, other = Path("assets/shapes/sana/vae"), Path("assets/shapes/vae-mixed")
    first = with_latents(tmp_path / "shards", tmp_path / "source", mine)
    write_in_process(first)
    before = contents(first.data.shards)
    (first.data.shards / DATASET_FILE).unlink()
    (first.data.shards / LEDGER / "00001.json").unlink()
    with pytest.raises(ShardError, match=rf"latents of another autoencoder than backbones.vae, {other}: now vae: "):
        write_in_process(with_latents(first.data.shards, tmp_path / "source", other))
    write_in_process(first)
    assert contents(first.data.shards) == before


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    with _only_writer(tmp_path), pytest.raises(LockedError, match="another process is writing"):
        write(curriculum_of(tmp_path), QUIET, workers=0)


def test_only_what_is_missing_or_damaged_is_written_again(photographs: tuple[Path, list], tmp_path: Path) -> None:
    _, sources = photographs
    root = tmp_path / "shards"
    curriculum = curriculum_of(root, sources)
    write_in_process(curriculum)
    whole = contents(root)
    (root / DATASET_FILE).unlink()
    (root / LEDGER / "00001.json").unlink()
    shard = next(root.glob("t2i/64/*/00000/*.mds"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (root / "t2i/64/64x64/00002.left-by-a-killed-run.tmp").mkdir(parents=True)
    untouched = root / LEDGER / "00002.json"
    written = untouched.stat().st_mtime_ns
    write_in_process(curriculum)
    assert contents(root) == whole
    assert untouched.stat().st_mtime_ns == written


def test_too_much_damage_stops_the_job_and_says_what_it_is(photographs: tuple[Path, list], tmp_path: Path) -> None:
    _, (photos, _) = photographs
    with pytest.raises(ShardError, match=r"2 of 15 records are damaged.*max_damaged allows \(10%\)") as stopped:
        write(curriculum_of(tmp_path / "shards", [photos], max_damaged=0.1, mixture={"t2i": 1}), QUIET, workers=0)
    assert str(Reason.NO_IMAGE) in str(stopped.value)
    assert not (tmp_path / "shards" / DATASET_FILE).exists()
    # What is unwanted is not damage: the image that is too small does not count.
    assert "2 of" in str(stopped.value)


def test_nothing_left_is_an_error(photographs: tuple[Path, list], tmp_path: Path) -> None:
    _, (photos, _) = photographs
    curriculum: Curriculum = curriculum_of(tmp_path / "shards", [photos], keep={"min_side": 9999}, mixture={"t2i": 1})
    with pytest.raises(ShardError, match=rf"no record is left.*\d+ x image too small.*{REJECTED_FILE}"):
        write(curriculum, QUIET, workers=0)
    assert Reason.TOO_SMALL in rejected(tmp_path / "shards").values()


def test_a_source_of_other_tasks_than_the_stages_or_without_rows_says_so(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(broken.encode(broken.photograph("chelsea")))
    list_file = tmp_path / "list.jsonl"
    source = {"kind": "edits", "name": "edits", "path": str(list_file)}
    for lines, words in (
        ([{"instruction": "x", "input": "1.png", "target": "1.png"}], "1 are edit, which no stage mixes"),
        ([], "the sources hold no record at all$"),
    ):
        list_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        curriculum = curriculum_of(tmp_path / f"shards{len(lines)}", [source], mixture={"multi_edit": 1})
        with pytest.raises(ShardError, match=f"no record is left.*{words}"):
            write(curriculum, QUIET, workers=0)


# ------------------------------------------------------------------------------------- what no stage could train on
def test_a_stage_that_would_find_no_record_fails_the_job_each_time_and_keeps_what_is_written(tmp_path: Path) -> None:
    """The photographs are smaller than the second stage's images."""
    sources = [{**s, "path": s["path"]} for s in collection(tmp_path / "source", broken=False)]
    curriculum = curriculum_of(tmp_path / "shards", sources, mixture={"t2i": 0.5, "edit": 0.5})
    second = curriculum.stages[1].model_copy(update={"resolution": 1024})
    large = curriculum.model_copy(update={"stages": (curriculum.stages[0], second)})
    for _ in range(2):
        with pytest.raises(ShardError, match=r"second: t2i at 1024 px; second: edit at 1024 px.*t2i/32/") as error:
            write(large, QUIET, workers=0)
        assert "first" not in str(error.value)
        assert DataSet.at(tmp_path / "shards").streams


def test_sources_that_cannot_serve_a_stage_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    sources = collection(tmp_path / "source")[:1]
    with pytest.raises(ShardError, match=r"first: edit at 32 px; second: edit at 64 px.*photos: t2i"):
        write(curriculum_of(tmp_path / "shards", sources), QUIET, workers=0)
    assert not (tmp_path / "shards").exists()


def test_a_finished_data_set_is_known_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sources were named by paths relative to where it was begun; other sources are others all the same."""
    collection(tmp_path / "begun/source")
    monkeypatch.chdir(tmp_path / "begun")
    sources = [{"kind": "folder", "name": "photos", "path": "source/photos.jsonl", "root": "source"}]
    curriculum = curriculum_of(Path("shards"), sources, mixture={"t2i": 1.0})
    dump(curriculum, tmp_path / "begun/curriculum.yaml")
    made = write(curriculum, QUIET, workers=0)
    monkeypatch.chdir(tmp_path)
    assert write(load_curriculum(tmp_path / "begun/curriculum.yaml"), QUIET, workers=0) == made
    other = load_curriculum(tmp_path / "begun/curriculum.yaml", ["data.prepare.sources.0.root=other"])
    with pytest.raises(ShardError, match=r"prepare\.sources\.0\.root: other, not source"):
        write(other, QUIET, workers=0)


# ------------------------------------------------------------------------------------------- lost, and added behind
def tars(root: Path, *contents: bytes) -> list[dict]:
    root.mkdir(exist_ok=True)
    for number, content in enumerate(contents):
        (root / f"{number}.tar").write_bytes(content)
    return [{"kind": "webdataset", "name": "web", "path": str(root / "*.tar")}]


def pairs_tar(count: int, first: int = 0) -> bytes:
    """Of images that differ."""
    members = []
    for number in range(first, first + count):
        image = broken.encode(photograph("coffee").crop((number, 0, 100 + number, 100)))
        members += [(f"{number:06d}.jpg", image), (f"{number:06d}.txt", b"a cup of coffee")]
    return broken.tar(members)


def test_lost_containers_stop_the_job_and_can_be_mended_in_place(tmp_path: Path) -> None:
    whole = pairs_tar(8, first=8)
    sources = tars(tmp_path / "web", pairs_tar(8), broken.LFS_POINTER)
    curriculum = curriculum_of(tmp_path / "shards", sources, mixture={"t2i": 1})
    with pytest.raises(ShardError, match=r"1, but .*max_lost_containers allows 0. web/1.tar: .*git lfs pull"):
        write_in_process(curriculum)
    # Half a tar is found when its records are looked through.
    tars(tmp_path / "web", pairs_tar(8), whole[: len(whole) // 2])
    with pytest.raises(ShardError, match=r"1, but .*web/1.tar: after 0000"):
        write_in_process(curriculum)
    tars(tmp_path / "web", pairs_tar(8), whole)
    assert {s.samples for s in write_in_process(curriculum).streams} == {16}


def test_lost_containers_are_allowed_by_name_and_only_so_many(tmp_path: Path) -> None:
    sources = tars(tmp_path / "web", pairs_tar(8), broken.LFS_POINTER, b"<html>")
    for allowed, keep in ((1, "drop"), (1, "keep"), (2, "keep")):
        options = {"max_lost_containers": allowed, "keep": {"duplicates": keep}, "mixture": {"t2i": 1}}
        curriculum = curriculum_of(tmp_path / f"shards-{keep}", sources, **options)
        if allowed == 1:
            with pytest.raises(ShardError, match=r"2, but .* allows 1"):
                write_in_process(curriculum)
        else:
            assert {s.samples for s in write_in_process(curriculum).streams} == {8}


def test_new_files_behind_a_finished_data_set_are_told(tmp_path: Path) -> None:
    curriculum = curriculum_of(tmp_path / "shards", tars(tmp_path / "web", pairs_tar(8)), mixture={"t2i": 1})
    write_in_process(curriculum)

    def said() -> str:
        console = Console(file=StringIO(), soft_wrap=True)
        write(curriculum, console, workers=0)
        return console.file.getvalue()

    assert "changed since" not in said()
    (tmp_path / "web" / "1.tar").write_bytes(pairs_tar(8, first=8))
    assert "The source web has changed since: 1 files then, 2 now" in said()
    for path in (tmp_path / "web").iterdir():
        path.unlink()
    assert "changed since" not in said(), "a finished data set needs its sources no more"


def test_what_a_user_puts_into_an_unfinished_data_set_stays(tmp_path: Path) -> None:
    curriculum = curriculum_of(tmp_path / "shards", tars(tmp_path / "web", pairs_tar(8)), mixture={"t2i": 1})
    dataset = write_in_process(curriculum)
    (tmp_path / "shards" / "dataset.json").unlink()
    stream = tmp_path / "shards" / dataset.streams[0].settings.name
    mine = [tmp_path / "shards" / "mine.tmp", tmp_path / "shards" / "a/b/c/12345", stream / "00000.mine.tmp"]
    ours = [stream / "00009", stream / f"00000.{'a' * 32}.tmp"]
    for folder in (*mine, *ours):
        folder.mkdir(parents=True)
    write(curriculum, Console(file=StringIO()), workers=0)
    assert all(folder.exists() for folder in mine)
    assert not any(folder.exists() for folder in ours)


def test_a_finished_data_set_of_an_earlier_version_is_kept_and_an_unfinished_one_is_not_mixed(tmp_path: Path) -> None:
    curriculum = curriculum_of(tmp_path / "shards", tars(tmp_path / "web", pairs_tar(8)), mixture={"t2i": 1})
    write_in_process(curriculum)
    settings = tmp_path / "shards" / "settings.json"
    written = json.loads(settings.read_text())
    settings.write_text(json.dumps(written | {"sources": {"web": written["sources"]["web"] - 1}}))
    console = Console(file=StringIO(), soft_wrap=True)
    write(curriculum, console, workers=0)
    assert "! An earlier version of this program read the source web" in console.file.getvalue()
    (tmp_path / "shards" / "dataset.json").unlink()
    with pytest.raises(ShardError, match=r"written with other settings: now sources\.web: "):
        write(curriculum, console, workers=0)


def test_what_ails_a_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """No traceback where the folder cannot be made, nor where the disk is full half-way."""
    (tmp_path / "file").write_text("")
    dump(curriculum_of(tmp_path / "file" / "shards"), tmp_path / "file.yaml")
    dump(curriculum_of(tmp_path / "shards"), tmp_path / "full.yaml")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name, code, words in (("file", 78, "file/shards"), ("full", 78, "No space left on device.*What is finished")):
        if name == "full":
            monkeypatch.setattr("data_pipeline.partitions.os.fsync", full)
        monkeypatch.setattr(sys, "argv", ["data_pipeline", "write", str(tmp_path / f"{name}.yaml"), "--workers", "0"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code
        assert re.search(words, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("written", "means"),
    [("not a picture", Reason.NOT_AN_IMAGE), ("picture truncated", Reason.TRUNCATED), ("duplicate", Reason.DUPLICATE)],
)
def test_a_ledger_from_when_images_were_called_pictures_is_read(written: str, means: Reason) -> None:
    line = json.dumps({"source": "s", "part": "p", "key": "k", "reason": written})
    assert TypeAdapter(Rejection).validate_json(line).reason is means
