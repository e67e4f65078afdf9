"""WISE and GEdit-Bench on files of published form: arithmetic by hand, prompts read and not run, lies refused."""

import json
import math
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.evaluation.servers import MODEL, Server, says
from wemmu.config.benchmarks import GEditOptions, WISEOptions
from wemmu.evaluation.benchmark import BenchmarkError, BenchmarkRequest, Judged, Mark
from wemmu.evaluation.gedit import viescore
from wemmu.evaluation.gedit.benchmark import TYPES, GEdit, edit_files, read_edits
from wemmu.evaluation.run_benchmark import run_benchmark
from wemmu.evaluation.wise import benchmark as wise
from wemmu.evaluation.wise.benchmark import CATEGORIES, WISE
from wemmu.sampling.request import Response

# The form of the published gpt_eval.py. It cannot run here: there is no openai.
GPT_EVAL = '''
import openai, no_such_module
def other(): return {"role": 1 + 1}
def build_evaluation_messages(prompt_data, image_base64):
    return [
        {"role": "system", "content": [{"type": "text", "text": "You judge."}]},
        {"role": "user", "content": [
            {"type": "text", "text": f"""Rate {{0, 1, 2}}.
PROMPT: "{prompt_data['Prompt']}"
EXPLANATION: "{prompt_data['Explanation']}"
"""},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image_base64}"}},
        ]},
    ]
'''
NUMBERS = "Consistency: {}\nRealism: {}\nAesthetic Quality: {}"
# A prompt of each category: id, numbers.
PROMPTS = {
    1: (2, 2, 2),
    400: (0, 0, 0),
    401: (1, 2, 0),
    700: (0, 1, 1),
    701: (2, 0, 0),
    900: (0, 2, 0),
    1000: (0, 0, 2),
}


# ----------------------------------------------------------------------------------------------------------- WISE
@pytest.mark.parametrize(
    ("text", "score"),
    [
        (NUMBERS.format(2, 1, 0), 0.8),
        (NUMBERS.format(0, 0, 2), 0.1),
        ("**Consistency**: 1\n**Realism:** 2/2\n- Aesthetic Quality: **1**", 0.6),
        (NUMBERS.format(2, 1, 3), None),
        (NUMBERS.format(2, 1, 0) + "\nRealism: 2", None),
        ("Consistency (0-2): a fine image\nRealism: 1\nAesthetic Quality: 1", None),
        ("Consistency: 2", None),
    ],
)
def test_wiscore_of_an_answer(text: str, score: float | None) -> None:
    numbers = wise.understood(text)
    assert (None if numbers is None else wise.wiscore(numbers)) == pytest.approx(score)


@pytest.fixture
def wise_files(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    parts = {"cultural_common_sense": (1, 400), "spatio-temporal_reasoning": (401, 700), "natural_science": (701, 1000)}
    for name, (first, last) in parts.items():
        items = [
            {
                "Prompt": f"prompt {n}",
                "Explanation": f"explained {n}",
                "Category": "",
                "Subcategory": "",
                "prompt_id": n,
            }
            for n in PROMPTS
            if first <= n <= last
        ]
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps(items))
    (tmp_path / "gpt_eval.py").write_text(GPT_EVAL)
    return tmp_path


def test_wise_end_to_end(server: Server, wise_files: Path) -> None:
    def reply(text: str, number: int) -> Any:
        asked = int(text.split('PROMPT: "prompt ')[1].split('"')[0])
        assert text.startswith("Rate {0, 1, 2}.")
        assert f'EXPLANATION: "explained {asked}"' in text
        return says(NUMBERS.format(*PROMPTS[asked]))

    server.replies = reply
    options = WISEOptions(data=wise_files, judge=server.options(wise_files), resamples=20)
    draw = lambda asked: [Response(Image.new("RGB", (8, 8), "blue")) for _ in asked]  # noqa: E731
    card = run_benchmark("wise", options, None, wise_files / "out", lambda: draw, MODEL)
    assert card is not None
    scores = {name: one["value"] for name, one in card["scores"].items()}
    categories = dict(zip(CATEGORIES, (0.5, 0.55, 0.15, 0.7, 0.2, 0.1), strict=True))
    assert {name: scores[name] for name in CATEGORIES} == pytest.approx(categories)
    # By hand: 0.4 x 0.5 + 0.167 x 0.55 + 0.133 x 0.15 + 0.1 x (0.7 + 0.2 + 0.1)
    assert card["score"] == "WiScore"
    assert scores["WiScore"] == pytest.approx(0.4118)
    assert scores["realism"] == pytest.approx(7 / 7)
    assert server.systems == ["You judge."] * len(PROMPTS)
    assert set(card["files"]) == {"gpt_eval.py", *(file.name for file in (wise_files / "data").iterdir())}
    # Whatever a prompt lacks, the name says so.
    server.replies = lambda text, number: says("nice") if 'prompt 1"' in text else reply(text, number)
    lying = WISEOptions(data=wise_files, judge=server.options(wise_files / "out", attempts=1), resamples=20)
    again = run_benchmark("wise", lying, None, wise_files / "out", lambda: draw, MODEL, "score")
    assert again is not None
    assert (again["score"], again["failures"]) == ("partial WiScore (1 of 7 not judged)", 1)


def test_the_published_wiscore_of_a_model_follows_from_its_categories() -> None:
    # FLUX.1-dev and GPT-4o in the publication's table: six categories, overall.
    for *parts, overall in ((0.48, 0.58, 0.62, 0.42, 0.51, 0.35, 0.50), (0.81, 0.71, 0.89, 0.83, 0.79, 0.74, 0.80)):
        marks = [Mark(n, n, n, {"WiScore": v}) for n, v in zip(CATEGORIES, parts, strict=True)]
        assert WISE.headline(marks)["WiScore"] == pytest.approx(overall, abs=0.01)
    assert next(iter(WISE.headline(marks[:2]))) == "partial WiScore (2 of 6 categories)"


def test_foreign_wise_files_are_named(server: Server, wise_files: Path) -> None:
    options = WISEOptions(data=wise_files, judge=server.options(wise_files))
    file, script = wise_files / "data" / "natural_science.json", wise_files / "gpt_eval.py"
    for changed, text, words in (
        (file, '[{"Prompt": "p", "Explanation": "e", "prompt_id": 1001}]', "1001.*WISE"),
        (file, '{"Prompt": "p"}', "no JSON list"),
        (file, "[1]", "not of WISE's form"),
        (script, GPT_EVAL.replace("prompt_data['Explanation']", "image_base64"), "image_base64 is not a field"),
        (script, "def evaluate(): ...", "build_evaluation_messages"),
    ):
        before = changed.read_text()
        changed.write_text(text)
        with pytest.raises(BenchmarkError, match=words):
            WISE(options, None)
        changed.write_text(before)
    script.unlink()
    with pytest.raises(BenchmarkError, match=r"gpt_eval\.py is missing; PKU-YuanGroup/WISE"):
        WISE(options, None)


# ---------------------------------------------------------------------------------------------------- GEdit-Bench
@pytest.mark.parametrize(
    ("text", "lower"),
    [
        ('{"score": [7, 4], "reasoning": "fine"}', 4),
        ('||V^=^V||\n{\n"score" : [10, 10],\n"reasoning" : "two\nlines"\n}\n||V^=^V||', 10),
        ('```json\n{"score": [0, 9.5], "reasoning": ""}\n```', 0),
        ("[6, 0]", 0),
        ('{"score": [7], "reasoning": ""}', None),
        ('{"score": [7, 11], "reasoning": ""}', None),
        ('{"score": [true, 4]}', None),
        ("[1, 2] or [3, 4]", None),
        ("I guess 5", None),
    ],
)
def test_the_lower_of_two_numbers_or_no_verdict(text: str, lower: float | None) -> None:
    assert viescore.understood(text) == lower


def _png(size: tuple[int, int], color: str) -> dict[str, bytes]:
    buffer = BytesIO()
    Image.new("RGB", size, color).save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": ""}


@pytest.fixture
def gedit_files(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    rows = [
        {
            "task_type": kind,
            "key": f"{kind}_{number}_{language}",
            "instruction": f"{language} {kind} {number}",
            "instruction_language": language,
            "input_image": _png((16, 16), "red"),
            "input_image_raw": _png((32, 16), "red"),
            "Intersection_exist": number == 0,
        }
        for kind in TYPES
        for number in range(1 + (kind == TYPES[0]))
        for language in ("en", "cn")
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "train-00000-of-00001.parquet")
    (tmp_path / "viescore").mkdir()
    parts = {name: name for name in (*viescore.SC, *viescore.PQ)} | {viescore.SC[-1]: "edit: <instruction>."}
    (tmp_path / "viescore" / "vie_prompts.py").write_text("".join(f'{n} = """{t}"""\n' for n, t in parts.items()))
    return tmp_path


@pytest.mark.parametrize("kind", ["a data set", "its splits"])
def test_what_save_to_disk_writes_is_read_as_the_parquet_files(kind: str, gedit_files: Path, tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict, Image, disable_progress_bars

    disable_progress_bars()
    (parquet,) = edit_files(gedit_files)
    whole = Dataset.from_parquet(str(parquet), cache_dir=str(tmp_path / "cache")).cast_column(
        "input_image_raw", Image()
    )
    if kind == "a data set":
        whole.save_to_disk(tmp_path / "saved", num_shards=2)
    else:
        DatasetDict(train=whole).save_to_disk(tmp_path / "saved", num_shards={"train": 2})
    files = edit_files(tmp_path / "saved")
    assert len(files) == 2
    for language in ("en", "cn"):
        assert read_edits(files, language) == read_edits([parquet], language)
    # The format of files instead of streams.
    files[0].write_bytes(b"ARROW1")
    with pytest.raises(BenchmarkError, match="not of GEdit-Bench's form"):
        read_edits(files, "en")
    with pytest.raises(BenchmarkError, match=r"holds no \*\.parquet or \*\.arrow.*stepfun-ai/GEdit-Bench"):
        edit_files(tmp_path / "cache")


def _options(server: Server, files: Path, language: str = "en", **changes: Any) -> GEditOptions:
    judge = server.options(files, **changes)
    return GEditOptions(data=files, viescore=files, language=language, judge=judge, resamples=20)


@pytest.mark.parametrize("language", ["en", "cn"])
def test_gedit_end_to_end(language: str, server: Server, gedit_files: Path) -> None:
    def reply(text: str, number: int) -> Any:
        if "edit: " not in text:
            return says('{"score": [4, 9], "reasoning": ""}')
        followed = 1 if text.endswith(f"{TYPES[0]} 1.") else 9
        return says(json.dumps({"score": [followed, 10], "reasoning": ""}))

    server.replies = reply
    options = _options(server, gedit_files, language)
    copies = lambda asked: [Response(request.images[0].resize((64, 32))) for request in asked]  # noqa: E731
    card = run_benchmark("gedit", options, None, gedit_files / "out", lambda: copies, MODEL)
    assert card is not None
    assert (card["title"], card["n"]) == (f"GEdit-Bench-{language.upper()}", len(TYPES) + 1)
    # SC and PQ are the lower numbers. Of the first type the mean of two edits counts, of the types the mean.
    scores = {name: one["value"] for name, one in card["scores"].items()}
    hard = (math.sqrt(9 * 4) + math.sqrt(1 * 4)) / 2
    assert scores[TYPES[0]] == pytest.approx(hard)
    assert scores["G_O"] == pytest.approx((10 * 6 + hard) / 11)
    assert scores["G_SC"] == pytest.approx((10 * 9 + 5) / 11)
    assert scores["G_PQ"] == 4
    # The edit that fails is not in the intersection.
    assert scores["G_O, intersection"] == 6
    assert scores["G_SC, intersection"] == 9
    # Consistency sees input and output, quality the output alone, which is the same for all here.
    assert server.images.count(2) == 12
    assert server.images.count(1) < 12


def test_an_edit_without_a_verdict_is_left_out_and_counted(server: Server, gedit_files: Path) -> None:
    server.replies = lambda text, number: says("so so" if TYPES[3] in text else "[5, 5]")
    copies = lambda asked: [Response(request.images[0]) for request in asked]  # noqa: E731
    options = _options(server, gedit_files, attempts=1)
    card = run_benchmark("gedit", options, None, gedit_files / "out", lambda: copies, MODEL)
    assert card is not None
    assert card["score"] == "partial G_O (1 of 12 not judged, 10 of 11 categories)"
    assert (card["failures"], card["scores"][card["score"]]["value"]) == (1, 5)


def test_the_judge_sees_what_the_model_saw(server: Server, gedit_files: Path) -> None:
    """A square output of a wide input is compared with the square middle of the input."""
    seen: list[list[tuple[int, int]]] = []
    benchmark = GEdit(_options(server, gedit_files), None)
    benchmark.server.ask = lambda text, images, *_: seen.append([i.size for i in images]) or 5.0  # type: ignore
    wide = BenchmarkRequest(f"{TYPES[0]}_0_en", "x", TYPES[0], "x", 0, (Image.new("RGB", (32, 16)),))
    for size in ((24, 24), (64, 32)):
        benchmark.verdict(Judged(wide, Image.new("RGB", size)))
    assert seen == [[(16, 16), (16, 16)], [(16, 16)], [(32, 16), (32, 16)], [(32, 16)]]


def test_images_of_another_program_lie_as_published(server: Server, gedit_files: Path) -> None:
    server.replies = lambda text, number: says("[10, 10]")
    theirs = gedit_files / "theirs"
    for kind in TYPES:
        for number in range(1 + (kind == TYPES[0])):
            file = theirs / "fullset" / kind / "en" / f"{kind}_{number}_en.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 4)).save(file)
    card = run_benchmark("gedit", _options(server, gedit_files), None, gedit_files / "out", theirs, MODEL)
    assert card is not None
    assert card["scores"]["G_O"]["value"] == 10


def test_foreign_gedit_files_are_named(server: Server, gedit_files: Path) -> None:
    prompts = gedit_files / "viescore" / "vie_prompts.py"
    whole = prompts.read_text()
    for text, words in (
        (whole.replace(viescore.PQ[-1], "_other"), f"{viescore.PQ[-1]}.*TIGER-AI-Lab/VIEScore"),
        (whole.replace("<instruction>", "it"), "no <instruction>"),
    ):
        prompts.write_text(text)
        with pytest.raises(BenchmarkError, match=words):
            GEdit(_options(server, gedit_files), None)
    prompts.write_text(whole)
    (file,) = (gedit_files / "data").iterdir()
    table = pq.read_table(file)
    pq.write_table(table.drop_columns(["key"]), file)
    with pytest.raises(BenchmarkError, match="not of GEdit-Bench's form"):
        GEdit(_options(server, gedit_files), None)
    pq.write_table(table.slice(0, 1), file)
    with pytest.raises(BenchmarkError, match="no edits with instructions in cn"):
        GEdit(_options(server, gedit_files, "cn"), None)
    file.unlink()
    with pytest.raises(BenchmarkError, match="stepfun-ai/GEdit-Bench"):
        GEdit(_options(server, gedit_files), None)
