"""Judges behind a server that is slow, fails or lies, and the benchmarks that ask them, on files of published form."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.evaluation.servers import MODEL, Reply, Server, says
from wemmu.config import ConfigError
from wemmu.config.benchmarks import DPGOptions, ImgEditOptions, ServerOptions
from wemmu.config.benchmarks import options as checked
from wemmu.evaluation.benchmark import BenchmarkError, Mark
from wemmu.evaluation.dpg import benchmark as dpg
from wemmu.evaluation.dpg.benchmark import COLUMNS, DPG, read_items
from wemmu.evaluation.imgedit import benchmark as imgedit
from wemmu.evaluation.imgedit.benchmark import ImgEdit
from wemmu.evaluation.run_benchmark import run_benchmark
from wemmu.evaluation.server_judge import ServerJudge
from wemmu.sampling.request import Response


def _judge(server: Server, folder: Path, **changes: Any) -> ServerJudge:
    return ServerJudge(server.options(folder, **changes), folder / "answers.jsonl", sleep=lambda _: None)


IMAGE = Image.new("RGB", (8, 8))
TROUBLE: dict[str, Reply] = {
    "fails": (500, {"error": "overloaded"}, 0.0),
    "limits": (429, {"error": "slow down"}, 0.0),
    "is no JSON": (200, b"<html>", 0.0),
    "is no completion": (200, {"choices": []}, 0.0),
    "says nothing": says(" "),
    "lies": says("yes and no"),
    "chats": says("what a lovely image"),
    "is slow": (200, {}, 1.0),
}


@pytest.mark.parametrize("kind", TROUBLE)
def test_trouble_is_asked_again_and_never_a_verdict(kind: str, server: Server, tmp_path: Path) -> None:
    server.replies = lambda text, number: TROUBLE[kind] if number < 3 else says("Yes.")
    judge = _judge(server, tmp_path, timeout_s=0.3)
    assert judge.ask("is it?", [IMAGE], dpg.understood) is True
    assert len(server.asked) == 3
    server.replies = lambda text, number: TROUBLE[kind]
    assert judge.ask("is it not?", [IMAGE], dpg.understood) is None
    assert len(server.asked) == 6
    # Only what was understood is kept.
    assert [json.loads(line)["answer"] for line in (tmp_path / "answers.jsonl").open()] == ["Yes."]


def test_an_answer_is_asked_for_once_and_the_key_is_written_nowhere(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "very-secret")
    for _ in range(2):
        judge = _judge(server, tmp_path, key_env="JUDGE_KEY")
        assert judge.ask("is it?", [IMAGE], dpg.understood) is True
        assert judge.identity() == {"model": "judge", "served": ["judge-2026"], "temperature": 0}
    assert server.headers == ["Bearer very-secret"]
    assert judge.ask("is it?", [Image.new("RGB", (8, 8), "red")], dpg.understood) is True
    assert len(server.asked) == 2
    assert all(b"very-secret" not in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    server.replies = lambda text, number: (401, {"error": "no"}, 0.0)
    with pytest.raises(BenchmarkError, match=r"401.*JUDGE_KEY"):
        judge.ask("another", [IMAGE], dpg.understood)


def test_a_server_that_is_not_there_is_a_failure_not_a_verdict_and_ends_the_scoring(tmp_path: Path) -> None:
    options = ServerOptions(url="http://127.0.0.1:9/v1", model="m", attempts=2, timeout_s=1)
    judge = ServerJudge(options, tmp_path / "answers.jsonl", sleep=lambda _: None)
    for number in range(7):
        assert judge.ask(f"is it {number}?", [IMAGE], dpg.understood) is None
    with pytest.raises(BenchmarkError, match=r"m at http://127.0.0.1:9/v1 has left 8 questions.*ConnectError"):
        judge.ask("is it?", [IMAGE], dpg.understood)


@pytest.mark.parametrize("url", ["localhost:8000/v1", "", "ftp://host/v1", "http://", "http://host:port/v1"])
def test_what_is_no_url_is_refused_before_anything_is_generated(url: str) -> None:
    with pytest.raises(ConfigError, match=r"judge\.url"):
        checked("dpg", {"data": ".", "judge": {"url": url, "model": "m"}})


def test_a_judge_without_any_verdict_has_no_score(server: Server, dpg_file: Path, tmp_path: Path) -> None:
    """An empty card with exit code 0 would pass for a result."""
    server.replies = lambda text, number: says("perhaps")
    options = DPGOptions(data=tmp_path, judge=server.options(tmp_path, attempts=1), images=1)
    (tmp_path / "answers.jsonl").write_text('{"another": "file"}\n')

    def draw(requests: Any) -> list[Response]:
        return [Response(IMAGE) for _ in requests]

    with pytest.raises(BenchmarkError, match=r"has given no verdict.*'perhaps'"):
        run_benchmark("dpg", options, None, tmp_path / "out", lambda: draw, MODEL)
    assert not (tmp_path / "out/card.json").exists()
    dpg_file.write_text(dpg_file.read_text().replace("sun1", "sun/1"))
    with pytest.raises(BenchmarkError, match="'sun/1_0', which is not a valid file name"):
        run_benchmark("dpg", options, None, tmp_path / "out2", lambda: draw, MODEL)


# ---------------------------------------------------------------------------------------------------- DPG-Bench
ROWS = [
    # item, text, keywords, number, parents, category, ..., question; 3 depends on 1, 4 on 2 and 3
    ("cat0", "a red cat beside a tall tree", 1, "0", "entity", "Is there a cat?"),
    ("cat0", "a red cat beside a tall tree", 2, "0", "entity", "Is there a tree?"),
    ("cat0", "a red cat beside a tall tree", 3, "1", "attribute", "Is the cat red?"),
    ("cat0", "a red cat beside a tall tree", 4, "2,3", "relation", "Is the red cat beside the tree?"),
    ("sun1", "the sun", 1, "0", "entity", "Is there a sun?"),
]


@pytest.fixture
def dpg_file(tmp_path: Path) -> Path:
    file = tmp_path / "dpg_bench.csv"
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([*COLUMNS[:2], "keywords", *COLUMNS[2:5], "category_detailed", "tuple", COLUMNS[5]])
        for item, text, number, parents, category, question in ROWS:
            writer.writerow([item, text, "", number, parents, category, "whole", "", question])
    return file


@pytest.mark.parametrize(
    ("answers", "share"),
    [("yyyy", 1.0), ("nyyy", 0.25 * 2), ("ynyy", 0.5), ("yyny", 0.5), ("nnnn", 0.0), ("yyyn", 0.75)],
)
def test_a_question_counts_only_with_its_parents(answers: str, share: float, dpg_file: Path) -> None:
    item = read_items(dpg_file)["cat0"]
    given = {number: answer == "y" for number, answer in enumerate(answers, start=1)}
    # nyyy: the cat is not there, so neither is a red cat; that it is beside the tree has red cat as a parent, which was
    # answered yes: only direct parents count, as published.
    assert dpg.score(given, item.parents) == pytest.approx(share)


def test_dpg_end_to_end_with_failures_counted(server: Server, dpg_file: Path, tmp_path: Path) -> None:
    server.replies = lambda text, number: says("No" if "red?" in text else "yes")
    options = DPGOptions(data=tmp_path, judge=server.options(tmp_path), images=2, resamples=20)

    def draw(requests: Any) -> list[Response]:
        return [Response(Image.new("RGB", (8, 8), (request.seed, 0, 0))) for request in requests]

    card = run_benchmark("dpg", options, None, tmp_path / "out", lambda: draw, MODEL)
    assert card is not None
    # cat0: cat and tree; not the colour, nor what depends on it. sun1: all. The mean of 50 and 100.
    assert card["scores"]["DPG-Bench"]["value"] == pytest.approx(75)
    assert card["scores"]["attribute"]["value"] == 0
    assert card["judges"]["vlm"]["served"] == ["judge-2026"]
    asked = len(server.asked)
    assert asked == 2 * len(ROWS)
    again = run_benchmark("dpg", options, None, tmp_path / "out", lambda: draw, MODEL, "score")
    assert again is not None
    assert (again["scores"], len(server.asked)) == (card["scores"], asked)

    server.replies = lambda text, number: says("perhaps") if "sun" in text else says("yes")
    lying = DPGOptions(data=tmp_path, judge=server.options(tmp_path / "out", attempts=1), images=2, resamples=20)
    card = run_benchmark("dpg", lying, None, tmp_path / "out", lambda: draw, MODEL, "score")
    assert card is not None
    assert (card["score"], card["failures"]) == ("partial DPG-Bench (2 of 4 not judged)", 2)
    # Its interval is of all resamples, not of those that happen to lack as many verdicts.
    assert card["scores"][card["score"]] == {"value": 100, "low": 100, "high": 100}


def test_foreign_dpg_files_are_named(dpg_file: Path, tmp_path: Path, server: Server) -> None:
    text = dpg_file.read_text()
    for broken, words in (
        (text.replace("proposition_id", "id"), "no column proposition_id.*ELLA"),
        (text.replace('"2,3"', "2;3"), "line 5"),
        (text.replace('"2,3"', "9"), "depends on 9"),
        # Half a file, and a table program's encoding.
        (text.replace(",Is there a sun?", ""), "line 6.*question_natural_language is empty"),
        (text.replace("Is the", "Is th\xe9"), "not UTF-8"),
    ):
        dpg_file.write_text(broken, encoding="latin-1")
        with pytest.raises(BenchmarkError, match=words):
            read_items(dpg_file)
    dpg_file.unlink()
    with pytest.raises(BenchmarkError, match=r"dpg_bench\.csv is missing; TencentQQGYLab/ELLA"):
        DPG(DPGOptions(data=tmp_path, judge=server.options(tmp_path)), None)


# ------------------------------------------------------------------------------------------------------ ImgEdit
KINDS = ("remove", "remove", "style")
VERDICT = "Brief reasoning: the cat is gone, mostly.\nPrompt Compliance: {}\nVisual Naturalness: {}\nIntegrity: {}"


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (VERDICT.format(5, 4, 3), 4.0),
        (VERDICT.format("**2**", 1, 1), pytest.approx(4 / 3)),
        (VERDICT.format(5, 4, 9), None),
        ("Prompt Compliance: 5", None),
        ("I cannot judge images.", None),
    ],
)
def test_three_numbers_from_one_to_five_or_no_verdict(text: str, score: float | None) -> None:
    assert imgedit.understood(text) == score


@pytest.fixture
def imgedit_files(tmp_path: Path) -> Path:
    (tmp_path / "images" / "animal").mkdir(parents=True)
    edits = {}
    for key, kind in zip("123", KINDS, strict=True):
        edits[key] = {"id": f"animal/{key}.jpg", "prompt": f"edit {key}", "edit_type": kind}
        Image.new("RGB", (16, 12)).save(tmp_path / "images" / "animal" / f"{key}.jpg")
    prompts = {kind: f"Judge this {kind}: <edit_prompt>" for kind in ("remove", "style")}
    (tmp_path / "basic_edit.json").write_text(json.dumps(edits))
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    return tmp_path


def test_imgedit_end_to_end(server: Server, imgedit_files: Path) -> None:
    numbers = {"edit 1": (1, 1, 1), "edit 2": (3, 3, 3), "edit 3": (5, 5, 5)}
    server.replies = lambda text, number: says(VERDICT.format(*numbers[text[-6:]]))
    given = {"data": imgedit_files, "images": imgedit_files / "images", "resamples": 20}
    options = ImgEditOptions(**given, judge=server.options(imgedit_files))
    out = imgedit_files / "out"
    card = run_benchmark(
        "imgedit", options, None, out, lambda: lambda asked: [Response(r.images[0]) for r in asked], MODEL
    )
    assert card is not None
    assert sorted(server.asked) == [
        "Judge this remove: edit 1",
        "Judge this remove: edit 2",
        "Judge this style: edit 3",
    ]
    # The mean over the types, (2 + 5) / 2, not over the edits.
    values = {name: one["value"] for name, one in card["scores"].items()}
    assert values == {"ImgEdit-Bench": 3.5, "remove": 2, "style": 5}
    failed = [Mark("1", "remove", "1", {"score": 2.0}), Mark("2", "style", "2", {"score": None})]
    assert next(iter(ImgEdit.headline(failed))) == "partial ImgEdit-Bench (1 of 2 not judged)"

    (imgedit_files / "images" / "animal" / "2.jpg").write_bytes(b"no image")
    with pytest.raises(BenchmarkError, match=r"2\.jpg cannot be read as an image"):
        ImgEdit(options, None).requests()
    (imgedit_files / "images" / "animal" / "2.jpg").unlink()
    with pytest.raises(BenchmarkError, match=r"2\.jpg is missing; PKU-YuanGroup/ImgEdit"):
        ImgEdit(options, None)
