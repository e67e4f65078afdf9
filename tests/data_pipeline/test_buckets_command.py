"""`buckets` tells beforehand what writing will do, from headers alone."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image, ImageFile
from rich.console import Console
from typer.testing import CliRunner

from data_pipeline import preview
from data_pipeline.__main__ import app
from data_pipeline.images import decode
from data_pipeline.plan import plan
from data_pipeline.preview import header, survey
from data_pipeline.preview_text import show_buckets
from data_pipeline.records import EncodedImage, RejectedError
from tests.data_pipeline.broken import rotated_jpeg, truncated_jpeg
from tests.data_pipeline.worlds import SHAPES, collection, curriculum_of, write_in_process
from wemmu.config import Curriculum, dump
from wemmu.config.shards import StreamSettings


def shown(curriculum: Curriculum, sample: int = 1000) -> str:
    console = Console(file=io.StringIO(), width=120)
    show_buckets(curriculum, console, sample)
    return console.file.getvalue()


def dumped(curriculum: Curriculum, folder: Path) -> Path:
    dump(curriculum, folder / "curriculum.yaml")
    return folder / "curriculum.yaml"


def test_it_foretells_exactly_what_writing_does(tmp_path: Path) -> None:
    sources = [*collection(tmp_path / "photos", broken=False), SHAPES]
    curriculum = curriculum_of(tmp_path / "shards", sources, keep={"caption_length": (1, 28), "min_side": 220})
    job = plan(curriculum)
    found = [survey(job, config, 1000) for config in job.prepare.sources]
    assert not (tmp_path / "shards").exists()
    dataset = write_in_process(curriculum)
    foretold = {}
    for one in found:
        for stream, count in one.streams.items():
            foretold[stream] = foretold.get(stream, 0) + count
    assert foretold == {s.settings: s.samples for s in dataset.streams}
    assert sum(one.reasons.total() for one in found) > 3
    assert all(one.exact and one.looked == one.records for one in found)
    ran = CliRunner().invoke(app, ["buckets", str(dumped(curriculum, tmp_path)), "--json"])
    said = json.loads(ran.stdout)
    assert {
        StreamSettings(**{n: v for n, v in s.items() if n != "records"}): s["records"] for s in said["streams"]
    } == (foretold)
    assert sum(sum(source["left_out"].values()) for source in said["sources"]) > 3
    assert [stage["name"] for stage in said["steps"]] == [stage.name for stage in curriculum.stages]


def test_no_image_is_decoded(written: Curriculum, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    monkeypatch.setattr(Image.Image, "load", never)
    shown(written)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_header_tells_the_size_that_the_upright_image_has(orientation: int) -> None:
    image = EncodedImage("it", rotated_jpeg(orientation))
    assert header(image, 10**9).size == decode(image, 10**9).size


@pytest.mark.parametrize(
    ("data", "max_pixels"), [(b"", 10**9), (b"GIF8 not really", 10**9), (rotated_jpeg(), 100)], ids=str
)
def test_a_header_is_refused_for_the_reason_for_which_decoding_is(data: bytes, max_pixels: int) -> None:
    reasons = []
    for look in (header, decode):
        with pytest.raises(RejectedError) as error:
            look(EncodedImage("it", data), max_pixels)
        reasons.append(error.value.reason)
    assert reasons[0] is reasons[1]


def test_a_header_with_damaged_exif_is_of_an_upright_image() -> None:
    file = io.BytesIO()
    Image.new("RGB", (40, 20)).save(file, "PNG", exif=b"damaged!")
    image = EncodedImage("it", file.getvalue())
    with pytest.raises(SyntaxError):
        Image.open(file).getexif()
    assert header(image, 10**9).size == decode(image, 10**9).size == (40, 20)


def test_what_a_header_cannot_tell_is_left_to_writing() -> None:
    image = EncodedImage("it", truncated_jpeg())
    assert header(image, 10**9).size
    with pytest.raises(RejectedError):
        decode(image, 10**9)


def test_the_tables_show_buckets_losses_and_steps(written: Curriculum) -> None:
    text = shown(written)
    assert "~" not in text
    assert "64 px: 3 buckets of about 4,096 px in steps of 16 px" in text
    row = next(line.split() for line in text.splitlines() if line.startswith("48x80"))
    assert row[:4] == ["48x80", "1.67", "-6.2%", "3x5"]
    assert row[6] == "20.0%", "4:3 in 5:3 loses a fifth"
    assert "image too small" in text
    assert any(line.startswith("second, 64 px") and "reconstruction from t2i" in line for line in text.splitlines())


def test_counts_of_a_sample_are_scaled_up_and_marked(tmp_path: Path) -> None:
    curriculum = curriculum_of(tmp_path / "shards", collection(tmp_path / "photos", copies=14, broken=False))
    job = plan(curriculum)
    found = survey(job, job.prepare.sources[0], 12)
    assert not found.exact
    assert found.looked == 12
    assert found.records == 42
    text = shown(curriculum, 12)
    assert "~42" in text
    assert "estimates from a sample" in text


def test_drawings_go_to_the_square_and_are_all_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "SPREAD", 100)
    curriculum = curriculum_of(tmp_path / "shards")
    found = survey(plan(curriculum), curriculum.data.prepare.sources[0], 1)
    assert {(s.height, s.width) for s in found.streams} == {(32, 32), (64, 64)}
    assert found.records == 50
    assert not found.fits
