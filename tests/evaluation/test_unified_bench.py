"""Unified-Bench: the paper's arithmetic, its pairing, and no score under its name that is not whole."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.backbones.test_encoders import make_folder
from tests.evaluation.servers import Server, says
from wemmu.config.benchmarks import UnifiedBenchCaptionsOptions, UnifiedBenchOptions, options
from wemmu.evaluation.benchmark import BenchmarkError, BenchmarkRequest, Mark
from wemmu.evaluation.run_benchmark import run_benchmark
from wemmu.evaluation.unified_bench.benchmark import CAPTION, DIRECT, ENCODERS, SCORE, UnifiedBench, pairs
from wemmu.evaluation.unified_bench_captions import benchmark as duel
from wemmu.sampling.request import Response

# Table 2 of arXiv 2509.09666: CLIP, LongCLIP, DINOv2, DINOv3, overall.
TABLE = {
    "GPT-4o-Image": (90.42, 94.37, 81.74, 77.27, 85.95),
    "BAGEL": (88.97, 93.35, 78.55, 73.05, 83.48),
    "BLIP-3o": (84.84, 90.24, 68.31, 62.86, 76.56),
    "Janus-Pro": (88.72, 93.45, 78.30, 70.61, 82.77),
    "OmniGen2": (88.36, 93.11, 77.70, 74.07, 83.31),
    "Show-o": (80.18, 86.75, 58.20, 51.51, 69.16),
    "UniWorld-V1": (85.49, 91.53, 72.12, 66.83, 78.99),
    "UAE": (90.50, 94.35, 81.98, 77.54, 86.09),
}
NAMES = tuple(ENCODERS.values())


@pytest.mark.parametrize("model", TABLE)
def test_the_score_is_the_papers(model: str) -> None:
    *parts, overall = TABLE[model]
    # Two images around the published means.
    marks = [
        Mark(key, CAPTION, key, dict(zip(NAMES, (part + by for part in parts), strict=True)))
        for key, by in (("0", -5), ("1", 5))
    ]
    scores = UnifiedBench.headline(marks)
    assert list(scores) == [SCORE, *NAMES]
    assert scores[SCORE] == pytest.approx(overall, abs=0.011)
    assert list(scores.values())[1:] == pytest.approx(parts)


def test_a_part_is_never_called_the_score() -> None:
    whole = [Mark(str(i), CAPTION, str(i), dict.fromkeys(NAMES, 80.0)) for i in range(3)]
    lacking = [Mark("3", CAPTION, "3", {"CLIP": 80.0, "LongCLIP": 80.0, "DINOv2": 80.0})]
    failed = [Mark("3", CAPTION, "3", dict.fromkeys(NAMES, 80.0) | {"DINOv3": None})]
    direct = [Mark("3", DIRECT, "3", dict.fromkeys(NAMES, 80.0))]
    assert next(iter(UnifiedBench.headline(whole))) == SCORE
    for marks in (lacking, whole + lacking, whole + failed, direct):
        assert next(iter(UnifiedBench.headline(marks))) != SCORE
    assert next(iter(UnifiedBench.headline(lacking))) == "partial score (CLIP, LongCLIP, DINOv2)"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "Image").mkdir()
    for number in (0, 2, 10):
        Image.effect_noise((40 + number, 36), 60 + 9 * number).convert("RGB").save(tmp_path / "Image" / f"{number}.jpg")
    return tmp_path / "Image"


def test_reconstructions_pair_by_name_then_stem_then_recon(images: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "recon"
    theirs.mkdir()
    files = sorted(images.glob("*.jpg"))
    for name in ("0.jpg", "0.png", "2.png", "recon_10.png", "recon_2.png"):
        Image.new("RGB", (8, 8)).save(theirs / name)
    assert {k: f.name for k, f in pairs(files, theirs).items()} == {"0": "0.jpg", "2": "2.png", "10": "recon_10.png"}
    (theirs / "2.webp").write_bytes(b"")
    with pytest.raises(BenchmarkError, match=r"several reconstructions of 2\.jpg"):
        pairs(files, theirs)
    for file in theirs.glob("2.*"):
        file.unlink()
    (theirs / "recon_2.png").unlink()
    with pytest.raises(BenchmarkError, match=r"lacks the reconstructions of 1 of 3 images, the first is 2\.jpg"):
        pairs(files, theirs)


def test_copies_score_100_and_captions_make_the_benchmark(images: Path, tmp_path: Path) -> None:
    kinds = {"clip": "clip", "longclip": "clip", "dinov2": "dinov2", "dinov3": "dinov3"}
    folders = {name: make_folder(kind, tmp_path / "encoders" / name) for name, kind in kinds.items()}
    chosen = UnifiedBenchOptions(data=images, encoders=folders, resamples=20)
    copies = run_benchmark("unified_bench", chosen, None, tmp_path / "copies", images, {"model": "copies"})
    assert copies is not None
    assert copies["score"] == "Unified-Score from images, not captions"
    assert copies["scores"][copies["score"]]["value"] == pytest.approx(100, abs=1e-3)

    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps({"image": f"{n}.jpg", "caption": f"noise {n}"}) + "\n" for n in (0, 2, 10)))
    asked: list[BenchmarkRequest] = []

    def draw(requests: Sequence[BenchmarkRequest]) -> list[Response]:
        asked.extend(requests)
        return [Response(Image.new("RGB", (48, 48), "gray")) for _ in requests]

    given = chosen.model_copy(update={"captions": captions})
    card = run_benchmark("unified_bench", given, None, tmp_path / "drawn", lambda: draw, {"model": "gray"})
    assert card is not None
    assert [(request.text, request.images) for request in asked] == [("noise 0", ()), ("noise 2", ()), ("noise 10", ())]
    assert card["score"] == SCORE
    assert card["judges"].keys() == set(ENCODERS)
    score = card["scores"][SCORE]
    assert score["low"] <= score["value"] <= score["high"] < 99.9

    # A byte-order mark, and no newline at the end, as other programs write files.
    line = json.dumps({"image": "0.jpg", "caption": "noise"})
    captions.write_text(f"\ufeff{line}", encoding="utf-8")
    with pytest.raises(BenchmarkError, match=r"no caption for 2 of 3 images, the first is 2\.jpg"):
        UnifiedBench(given, None)
    captions.write_text(line.replace('"noise"', "null"))
    with pytest.raises(BenchmarkError, match="no caption for 3 of 3 images"):
        UnifiedBench(given, None)
    captions.write_text(f"{line}\n[{line}]")
    with pytest.raises(BenchmarkError, match="line 2 is not"):
        UnifiedBench(given, None)


def test_missing_images_and_unknown_encoders_are_named(images: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    encoder = {"clip": make_folder("clip", tmp_path / "clip")}
    with pytest.raises(BenchmarkError, match="UAE"):
        UnifiedBench(UnifiedBenchOptions(data=tmp_path / "empty", encoders=encoder), None)
    with pytest.raises(ValueError, match="longclip"):
        options("unified_bench", {"data": images, "encoders": {"siglip": images}})
    (images / "3.png").write_bytes(b"no image")
    with pytest.raises(BenchmarkError, match=r"3\.png cannot be read as an image"):
        UnifiedBench(UnifiedBenchOptions(data=images, encoders=encoder), None).requests()


# --------------------------------------------------------------------------------------------------- protocol 2
@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B is shorter.\nA", "A"),
        ("**B**", "B"),
        ("Both are fine.\n\nAnswer: T.", "T"),
        ("Winner: [b]", "B"),
        ("A\nbut I am not sure", None),
        ("A or B", None),
        ("", None),
    ],
)
def test_the_last_line_is_the_verdict(text: str, letter: str | None) -> None:
    assert duel.understood(text) == letter


def test_a_caption_wins_against_its_rivals_in_both_orders(images: Path, server: Server, tmp_path: Path) -> None:
    """The judge prefers our caption of 0, ties on 2, takes what it sees first on 10, and is silent on one rival's 2."""

    def reply(text: str, number: int) -> Any:
        a, b = (text.split(f"Caption {letter}:\n")[1].split("\n")[0] for letter in "AB")
        if "mute" in a + b and "2" in a + b:
            return says("I cannot compare.")
        best = {"0": "A" if a.startswith("ours") else "B", "2": "T", "10": "A"}[a.split()[-1]]
        return says(f"Reasons.\n{best}")

    server.replies = reply
    files = {}
    for name in ("ours", "good", "mute"):
        files[name] = tmp_path / f"{name}.jsonl"
        lines = [{"image": f"{n}.jpg", "caption": f"{name} {n}"} for n in (0, 2, 10)]
        files[name].write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = {"data": images, "captions": files["ours"], "resamples": 20, "judge": server.options(tmp_path, attempts=1)}
    options = UnifiedBenchCaptionsOptions(rivals={"good": files["good"]}, **given)
    card = run_benchmark("unified_bench_captions", options, None, tmp_path / "out", images, {"model": "files"})
    assert card is not None
    # 1, 1/2 and 1/2: who always takes the first one does not tell them apart.
    expected = {"win rate": 50 * 4 / 3, "win rate against good": 50 * 4 / 3}
    expected |= {"tie": 100 / 3, "first place": 100 * (0.5 + 0.5 + 1) / 3, "agreement": 200 / 3}
    assert {name: one["value"] for name, one in card["scores"].items()} == pytest.approx(expected)
    assert len(server.asked) == 6

    options = UnifiedBenchCaptionsOptions(rivals={"mute": files["mute"], "good": files["good"]}, **given)
    card = run_benchmark("unified_bench_captions", options, None, tmp_path / "two", images, {"model": "files"})
    assert card is not None
    assert (card["score"], card["failures"]) == ("partial win rate (1 of 6 not judged)", 1)
    assert card["scores"]["win rate against mute"]["value"] == pytest.approx(75)
    # What was asked before is not asked again: two images of the new rival in both orders, and what failed.
    assert len(server.asked) == 6 + 6
    with pytest.raises(BenchmarkError, match="generates nothing: give the folder of its images"):
        run_benchmark("unified_bench_captions", options, None, tmp_path / "model", lambda: lambda asked: [], {})
