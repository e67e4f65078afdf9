"""The report on a run folder that the test wrote: whole, from shipped weights, with parts missing, and none at all."""

import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.evaluation.fakes import noise, write_run
from tests.report.pages import Page
from wemmu.evaluation.run_record import ReportError, read_run
from wemmu.evaluation.run_report import missing, opening, write_report
from wemmu.readable import duration, percent


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("report") / "run")
    write_report(run)
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may take parts from."""
    return shutil.copytree(whole, tmp_path / "run")


def page_of(run: Path) -> Page:
    write_report(run)
    return Page((run / "report.html").read_text())


def test_page_needs_nothing_else(whole: Path):
    html = (whole / "report.html").read_text()
    page = Page(html)
    assert page.open == []
    assert page.links
    pages = [link for link in page.links if not link.startswith(("data:image/png;base64,", "#"))]
    cards = [f"{stage}/evaluation/index.html" for stage in ("stage1", "stage4")]
    assert pages == ["stage1/index.html", "stage4/index.html", *cards]
    assert all((whole / link).is_file() for link in pages)
    assert "../report.html" in Page((whole / "stage1" / "index.html").read_text()).links
    assert not re.findall(r"https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", html))
    assert not re.search(r"@import|url\((?!#)", html)


def test_page_tells_everything_in_order(whole: Path):
    text = Page((whole / "report.html").read_text()).text
    assert "trained from zero, through 2 stages of 100 and 100 steps" in text
    order = [
        "Requests and outputs",
        "Exact scores",
        "Losses",
        "Frozen and trained",
        "Wall time",
        "Data",
        "Configuration",
    ]
    places = [text.index(heading) for heading in order]
    assert places == sorted(places)
    # 6 of 8 right, and the interval that belongs to them.
    assert "75.0 % 40.9–92.9, of 8" in text
    assert "3 min 00 s" in text
    assert "aaaaaaaaaa" in text
    assert "32.8 k" not in text  # parts are counted one by one
    assert "16.4 k" in text
    assert "evaluation: prompts: 8" in text


def test_failures_are_shown_with_what_came_out(whole: Path):
    page = Page((whole / "report.html").read_text())
    assert "The scorer saw nothing that the world could draw" in page.text
    assert page.text.count("✗") > 5


def test_sheet_is_a_image(whole: Path):
    assert min(Image.open(whole / "samples.png").size) > 500


def test_shipped_start_is_admitted(tmp_path: Path):
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "manifest.json").write_text('{"stage": "stage1", "step": 6000}')
    text = page_of(write_run(tmp_path / "run", start=str(tmp_path / "shipped"))).text
    assert "continued shipped weights of a longer run" in text
    assert "same curriculum" not in text  # own-images.md starts another curriculum from them
    assert "from zero" not in text
    assert "after 6000 steps of an earlier run" in text


def test_stage_that_goes_on_from_the_stage_before_is_from_zero(run: Path):
    """The launcher writes the stage before into `start`; that is no shipped weight, with or without the curriculum."""
    config = run / "stage4" / "config.yaml"
    before = run / "stage1" / "checkpoints" / "step_00000100"
    config.write_text(config.read_text().replace("start: null", f"start: {before}"))
    assert read_run(run).stages[1].run.stage.start == before
    assert "from zero" in opening(read_run(run))
    (run / "curriculum.yaml").unlink()
    assert "from zero" in opening(read_run(run))


def test_missing_parts_are_named(run: Path):
    shutil.rmtree(run / "stage4" / "checkpoints")
    shutil.rmtree(run / "stage4" / "evaluation")
    (run / "stage4" / "evaluation.json").unlink()
    (run / "stage4" / "metrics.jsonl").unlink()
    (run / "ledger.jsonl").unlink()
    text = page_of(run).text
    assert "stage4 has not been trained" in text
    assert "answered by the model after stage1" in text
    assert "ledger is missing" in text
    assert "The data set no-such-shards does not exist" in text


def test_run_on_own_data_shows_its_sample_sheets_and_misses_nothing(run: Path):
    """Nothing can score one's own images, so `evaluation.prompts` is 0; what was drawn is shown all the same."""
    for stage in ("stage1", "stage4"):
        shutil.rmtree(run / stage / "evaluation")
        (run / stage / "evaluation.json").unlink()
        (run / stage / "samples").mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), "red").save(run / stage / "samples" / "step_00000100.png")
        config = run / stage / "config.yaml"
        config.write_text(config.read_text().replace("prompts: 8", "prompts: 0"))
    page = page_of(run)
    assert not [note for note in missing(read_run(run)) if "evaluated" in note]
    assert "by the newest model of each stage" in page.text
    assert "nothing to show" not in page.text
    assert "Exact scores" not in page.text
    assert len([link for link in page.links if link.startswith("data:image/png")]) == 2


def test_the_page_links_to_that_of_its_data(run: Path, tmp_path: Path):
    for config in [run / "curriculum.yaml", *run.glob("*/config.yaml")]:
        config.write_text(config.read_text().replace("no-such-shards", str(tmp_path / "shards")))
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "report.html").write_text("data")
    assert "../shards/report.html" in page_of(run).links


def test_unfinished_stage_and_old_scores_are_named(run: Path):
    newest = run / "stage4" / "checkpoints" / "step_00000100"
    manifest = (newest / "manifest.json").read_text().replace('"step": 100', '"step": 60')
    newest.rename(newest.with_name("step_00000060"))
    (newest.with_name("step_00000060") / "manifest.json").write_text(manifest)
    notes = missing(read_run(run))
    assert "stage4 is not finished: its newest checkpoint is of step 60 of 100." in notes
    assert "The scores of stage4 are of step 100, its newest checkpoint is of step 60." in notes


def test_run_before_any_step_has_a_report(run: Path):
    for path in run.iterdir():
        if path.name not in ("curriculum.yaml", "stage1", "stage4"):
            path.unlink()
    for stage in ("stage1", "stage4"):
        config = (run / stage / "config.yaml").read_text()
        shutil.rmtree(run / stage)
        (run / stage).mkdir()
        (run / stage / "config.yaml").write_text(config)
    text = page_of(run).text
    assert "No stage has sample images or scores yet" in text
    assert "No stage has written metrics yet" in text
    assert (run / "samples.png").is_file()


def test_torn_files_are_passed_over(run: Path):
    (run / "stage4" / "evaluation.json").write_text('{"tasks": {')
    with (run / "ledger.jsonl").open("a") as ledger:
        ledger.write('{"job": "exp')
    record = read_run(run)
    assert "stage4 has not been evaluated." in missing(record)
    assert len(record.timings) == 6


def test_broken_off_attempt_is_told(run: Path):
    with (run / "ledger.jsonl").open("a") as ledger:
        ledger.write(
            '{"job": "stage4", "attempt": 2, "event": "started", "pid": 1, "time": "2030-01-02T00:00:00+00:00"}\n'
        )
    part = next(part for part in read_run(run).timings if part.job == "stage4")
    assert (part.attempts, part.seconds, part.outcome) == (2, 180.0, "has not ended")


def test_changed_frozen_weights_are_not_called_frozen(run: Path):
    manifest = run / "stage4" / "checkpoints" / "step_00000100" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("a" * 64, "d" * 64))
    assert "Not the same in all stages, although frozen: VLM" in page_of(run).text


def test_all_wrong_is_reported_as_all_wrong(tmp_path: Path):
    text = page_of(write_run(tmp_path / "run", answer=noise)).text
    assert "0.0 % 0.0–32.4, of 8" in text
    assert text.count("✓") == 1  # in the legend


def test_folder_without_a_stage_is_refused(tmp_path: Path):
    with pytest.raises(ReportError, match="is not a run folder"):
        write_report(tmp_path)


@pytest.mark.parametrize(("seconds", "text"), [(3.2, "3 s"), (725, "12 min 05 s"), (11220, "3 h 07 min")])
def test_durations_are_for_people(seconds: float, text: str):
    assert duration(seconds) == text


def test_percent():
    assert percent(0.935) == "93.5\u202f%"
