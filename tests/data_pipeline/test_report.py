"""The report says what is on disk, needs nothing but itself, and is never in the way of the data set."""

import io
import json
from collections import Counter
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import pytest
from rich.console import Console

from data_pipeline import report as reporting
from data_pipeline.contents import records
from data_pipeline.ledger import Ledger
from data_pipeline.report import as_text, bins, streams_table
from data_pipeline.report_record import Report, report_of, swapped
from data_pipeline.write import write
from tests.data_pipeline.worlds import SHAPES, curriculum_of, photograph, write_in_process
from tests.report.pages import Page
from wemmu.config import Curriculum
from wemmu.config.prepare import EditsSource
from wemmu.config.shards import DataSet
from wemmu.config.task import Task


@pytest.fixture(scope="module")
def report(written: Curriculum) -> Report:
    return Report.load(written.data.shards / "report.json")


def test_every_record_that_was_read_was_kept_or_left_out_for_a_reason(written: Curriculum, report: Report) -> None:
    assert report.read == report.kept + report.unused + report.left_out(damaged=True) + report.left_out(damaged=False)
    # Edits of two images, which no stage mixes.
    assert report.unused == SHAPES["samples"]["multi_edit"]
    lines = [json.loads(line) for line in (written.data.shards / "rejected.jsonl").read_text().splitlines()]
    assert {r.reason: r.count for r in report.reasons} == Counter(line["reason"] for line in lines)
    assert [asdict(e) for r in report.reasons for e in r.examples] == lines
    assert {r.reason.name: r.reason.damaged for r in report.reasons} == {
        "TRUNCATED": True,
        "NO_IMAGE": True,
        "TOO_SMALL": False,
    }
    by_source = {s.name: (s.read, s.kept, s.damaged, s.unwanted) for s in report.sources}
    assert by_source == {"photos": (15, 12, 2, 1), "edits": (12, 12, 0, 0), "shapes": (50, 43, 0, 0)}


def test_streams_and_resolutions_count_what_is_on_disk(written: Curriculum, report: Report) -> None:
    root = written.data.shards
    stored = {s.settings.name: len(list(records(root, s))) for s in DataSet.at(root).streams}
    assert {s.settings.name: s.samples for s in report.streams} == stored
    for task in report.tasks:
        for resolution, samples in task.resolutions.items():
            same = [s for s in report.streams if (s.settings.task, s.settings.resolution) == (task.task, resolution)]
            assert sum(s.samples for s in same) == samples <= task.kept
            assert sum(row[3].bar for row in streams_table("", same).rows) == pytest.approx(1)
    assert sum(report.captions.values()) == report.kept
    assert sum(report.sides.values()) == report.kept - 43, "drawings have no size of their own"


def test_an_epoch_is_exactly_the_records_over_the_global_batch(report: Report) -> None:
    for stage in report.stages:
        at_resolution = [s for s in report.streams if s.settings.resolution == stage.resolution]
        for row in stage.tasks:
            samples = sum(s.samples for s in at_resolution if s.settings.task == row.records_of)
            assert Fraction(row.epoch) == Fraction(samples, stage.global_batch)
            assert sum(row.streams.values()) == pytest.approx(row.epoch)
            assert row.steps == round(stage.steps * row.share)
            assert row.epochs == pytest.approx(row.steps / row.epoch)
        assert sum(row.share for row in stage.tasks) == pytest.approx(1)


def test_tasks_without_records_of_their_own_are_counted_and_named_as_made_of_text_to_image(report: Report) -> None:
    rows = {row.task: row for row in report.stages[0].tasks}
    assert rows[Task.RECONSTRUCTION].records_of == rows[Task.T2I].records_of == Task.T2I
    assert rows[Task.RECONSTRUCTION].samples == rows[Task.T2I].samples
    assert "reconstruction from t2i" in as_text(report)


def test_it_notes_streams_that_are_smaller_than_a_batch_and_tasks_that_cannot_be_trained(tmp_path: Path) -> None:
    small = {**SHAPES, "samples": {"t2i": 3, "edit": 4}}
    curriculum = curriculum_of(tmp_path, [small], mixture={"t2i": 1.0, "edit": 1.0})
    dataset = write_in_process(curriculum)
    notes = Report.load(tmp_path / "report.json").notes
    assert any("t2i/32/32x32 has fewer records" in note for note in notes)
    assert not any("edit" in note for note in notes)
    ledger = Ledger(tmp_path).entries(2)
    without = DataSet(streams=tuple(s for s in dataset.streams if s.settings.task == Task.T2I))
    assert any("mixes edit, but there is no record" in n for n in report_of(curriculum, without, ledger).notes)


def test_the_page_holds_its_images_and_loads_nothing(written: Curriculum, report: Report) -> None:
    html = (written.data.shards / "report.html").read_text()
    page = Page(html)
    assert page.open == []
    assert page.tags["img"] > len(report.streams)
    assert all(address.startswith("data:image/") for address in page.links)
    assert not page.tags.keys() & {"script", "link", "iframe"}
    assert "url(" not in html
    for stream in report.streams:
        assert f"{stream.settings.height} × {stream.settings.width}" in html
    assert "a tabby cat" in html
    order = ["records read", "Worth a look", "Where the records came from", "Why records were left out", "gone.jpg"]
    order += ["How long an epoch is", "reconstruction from t2i", "Steps an epoch of each stream", "What was written"]
    order += [
        "Records by task",
        "Streams",
        "Shorter side",
        "Length of the prompt",
        "What it looks like",
        "Text to image",
    ]
    places = [page.text.index(words) for words in order]
    assert places == sorted(places)


def test_what_strangers_wrote_is_shown_as_text(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text(
        json.dumps({"image": "gone\x1b[2J.jpg", "caption": "?"}) + '\n{"image": "a.png", "caption": "<script>[bold]"}\n'
    )
    photograph("coffee").save(tmp_path / "a.png")
    source = {"kind": "folder", "name": "it", "path": str(tmp_path / "list.jsonl"), "root": str(tmp_path)}
    shards = tmp_path / "shards"
    write_in_process(curriculum_of(shards, [source], mixture={"t2i": 1.0}))
    assert "&lt;script&gt;[bold]" in (shards / "report.html").read_text()
    text = (shards / "report.txt").read_text()
    assert all(c.isprintable() or c == "\n" for c in text)


def test_the_text_fits_a_terminal_and_is_printed_when_writing_ends(copied: Curriculum, report: Report) -> None:
    text = (copied.data.shards / "report.txt").read_text()
    assert max(map(len, text.splitlines())) <= 120
    (copied.data.shards / "report.json").unlink()
    console = Console(file=io.StringIO(), soft_wrap=True, markup=False, highlight=False)
    write(copied, console, workers=0)
    printed = console.file.getvalue()
    assert "nothing to write" in printed
    assert all(line in printed for line in text.splitlines()[2:])


def test_a_report_that_is_missing_is_made_again_and_one_that_is_there_is_left(copied: Curriculum) -> None:
    file = copied.data.shards / "report.json"
    before = Report.load(file)
    file.unlink()
    write_in_process(copied)
    assert Report.load(file).model_copy(update={"root": before.root, "written": before.written}) == before
    file.write_text("kept")
    write_in_process(copied)
    assert file.read_text() == "kept"


def test_a_report_that_fails_leaves_the_data_set_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(reporting, "page", fail)
    console = Console(file=io.StringIO(), soft_wrap=True)
    dataset = write(curriculum_of(tmp_path), console, workers=0)
    assert "disk full" in console.file.getvalue()
    assert DataSet.at(tmp_path) == dataset
    assert not (tmp_path / "report.json").exists()
    monkeypatch.undo()
    write_in_process(curriculum_of(tmp_path))
    assert (tmp_path / "report.json").exists()


def test_bins_run_from_the_first_to_the_last_that_hold_anything() -> None:
    assert bins({1: 5, 64: 2}, (0, 1, 16, 64)) == [("1–15", 5), ("16–63", 0), ("64 or more", 2)]
    assert bins({0: 1}, (0, 1, 16)) == [("0", 1)]
    assert bins({}, (0, 1)) == []


@pytest.mark.parametrize(
    ("given", "made", "noted"),
    [
        # As the published sets of docs/data.md name them, and the default.
        ("input", "target", 0),
        ("image", "image", 0),
        ("input_images", "output_images", 0),
        ("src_img", "edited_img", 0),
        ("source_img", "target_img", 0),
        # Swapped.
        ("edited_img", "src_img", 2),
        ("output_images", "image", 1),
        ("image", "original_image", 1),
        # Names that tell nothing, or both.
        ("image_a", "image_b", 0),
        ("edit_source", "edit_target", 0),
    ],
)
def test_columns_of_edits_whose_names_say_the_opposite_are_noted(given: str, made: str, noted: int) -> None:
    source = EditsSource(kind="edits", name="mine", path="a.jsonl", input=given, target=made)
    notes = swapped([source])
    assert len(notes) == (noted > 0)
    assert sum(note.count(" is the column ") for note in notes) == noted
