"""GenEval: the published rules by hand, and its files and judges of the real classes end to end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor, SwinConfig

from wemmu.config.benchmarks import GenEvalOptions
from wemmu.evaluation.benchmark import BenchmarkError, Mark
from wemmu.evaluation.geneval.benchmark import GenEval
from wemmu.evaluation.geneval.judges import ColorJudge
from wemmu.evaluation.geneval.rules import TASKS, Detection, kept, relations, verdict
from wemmu.shapes.render import render
from wemmu.shapes.scene import Object, Scene

CLIP = Path("assets/shapes/encoders/clip")
# Of the published form, one prompt of each task.
PROMPTS: list[dict[str, Any]] = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "two_object",
        "include": [{"class": "bench", "count": 1}, {"class": "cow", "count": 1}],
        "prompt": "a photo of a bench and a cow",
    },
    {
        "tag": "counting",
        "include": [{"class": "cow", "count": 2}],
        "exclude": [{"class": "cow", "count": 3}],
        "prompt": "a photo of two cows",
    },
    {
        "tag": "colors",
        "include": [{"class": "cow", "count": 1, "color": "red"}],
        "prompt": "a photo of a red cow",
    },
    {
        "tag": "position",
        "include": [{"class": "cow", "count": 1}, {"class": "bench", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a bench left of a cow",
    },
    {
        "tag": "color_attr",
        "include": [{"class": "cow", "count": 1, "color": "red"}, {"class": "bench", "count": 1, "color": "blue"}],
        "prompt": "a photo of a red cow and a blue bench",
    },
]
NAMES = ("bench", "cow")


def _at(x: float, y: float, size: float = 10, score: float = 0.95) -> Detection:
    return Detection((x, y, x + size, y + size), score, np.ones((4, 4), bool))


def _colored(*colors: str) -> Any:
    return lambda name, found: list(colors)[: len(found)]


def _is_right(number: int, objects: dict[str, list[Detection]], *colors: str) -> bool:
    return verdict(PROMPTS[number], objects, _colored(*colors))[0]


def test_the_rules_of_each_task() -> None:
    cow, bench = _at(50, 0), _at(0, 0)
    assert _is_right(0, {"bench": [bench]})
    assert not _is_right(0, {"cow": [cow]})
    assert _is_right(1, {"bench": [bench], "cow": [cow]})
    assert not _is_right(1, {"bench": [bench]})
    assert [_is_right(2, {"cow": [cow] * count}) for count in (1, 2, 3)] == [False, True, False]
    assert _is_right(3, {"cow": [cow]}, "red")
    assert not _is_right(3, {"cow": [cow]}, "blue")
    assert _is_right(4, {"bench": [bench], "cow": [cow]})
    assert not _is_right(4, {"bench": [cow], "cow": [bench]})
    # Without the target nothing stands beside it, though the other object is there.
    assert "expected cow" in verdict(PROMPTS[4], {"bench": [bench]}, _colored())[1]
    assert not _is_right(5, {"bench": [bench], "cow": [cow]}, "red")
    # Only as many as asked for are looked at, the most confident first.
    assert _is_right(3, {"cow": kept([_at(0, 0, score=0.5), cow], "colors")}, "red", "blue")


def test_directions_need_the_centres_to_be_apart() -> None:
    middle = _at(100, 100, 20)
    assert relations(_at(0, 100, 20), middle) == {"left of"}
    assert relations(_at(200, 100, 20), middle) == {"right of"}
    assert relations(_at(100, 0, 20), middle) == {"above"}
    assert relations(_at(100, 200, 20), middle) == {"below"}
    assert relations(_at(0, 0, 20), middle) == {"left of", "above"}
    # 0.1 * (20 + 20) = 4 px do not count.
    assert relations(_at(104, 100, 20), middle) == set()
    # Of 8 px, 4 are left, half of the offset: not more than half of it.
    assert relations(_at(108, 100, 20), middle) == set()
    assert relations(_at(109, 100, 20), middle) == {"right of"}


def test_counting_is_stricter_and_at_most_sixteen_count() -> None:
    found = [_at(0, 0, score=score) for score in (0.2, 0.5, 0.91)]
    assert [len(kept(found, tag)) for tag in ("colors", "counting")] == [2, 1]
    assert kept(found, "colors")[0].score == 0.91
    assert len(kept([_at(0, 0)] * 20, "two_object")) == 16


def test_the_score_is_the_mean_over_tasks_not_images() -> None:
    marks = [Mark(f"{i}", "single_object", f"{i}", {"correct": 1.0}) for i in range(80)]
    marks += [Mark(f"x{task}", task, f"x{task}", {"correct": 0.0}) for task in TASKS[1:]]
    assert GenEval.headline(marks)["GenEval"] == pytest.approx(1 / 6)
    assert next(iter(GenEval.headline(marks[:80]))) == "partial GenEval (1 of 6 tasks)"


def make_detector(folder: Path) -> Path:
    """Write a Mask2Former of two classes, with random weights, in the published layout."""
    torch.manual_seed(0)
    swin = SwinConfig(
        image_size=32,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16}
    sizes |= {"dim_feedforward": 16, "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2}
    labels = dict(enumerate(NAMES))
    config = Mask2FormerConfig(backbone_config=swin, num_queries=6, **sizes, id2label=labels)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    # Confident in its first class, so that there is something to judge.
    model.class_predictor.bias.data = model.class_predictor.bias.data.new_tensor([4.0, 0.0, -4.0])
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_detector(tmp_path_factory.mktemp("geneval") / "mask2former")


@pytest.fixture
def chosen(tmp_path: Path, detector: Path) -> GenEvalOptions:
    data = tmp_path / "geneval"
    for name in ("prompts", "evaluation"):
        (data / name).mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in PROMPTS)
    (data / "prompts" / "evaluation_metadata.jsonl").write_text(text, encoding="utf-8")
    (data / "evaluation" / "object_names.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    return GenEvalOptions(data=data, detector=detector, clip=CLIP, images=2, resamples=20)


def test_clip_names_the_colour_of_an_object_and_ignores_what_is_around_it() -> None:
    judge, size = ColorJudge(CLIP, "cpu"), 64
    cell = np.zeros((size, size), bool)
    cell[: size // 2, : size // 2] = True
    found = []
    for around in ("red", "blue", "green"):
        scene = Scene("white", (Object(0, "circle", "red", "large"), Object(1, "square", around, "large")))
        found += judge(render(scene, size), "circle", [Detection((0, 0, size, size), 1.0, cell)])
    assert len(set(found)) == 1


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("prompts/evaluation_metadata.jsonl", None, "djghosh13/geneval"),
        ("evaluation/object_names.txt", None, "djghosh13/geneval"),
        ("prompts/evaluation_metadata.jsonl", '{"tag": "odd", "include": [], "prompt": "p"}', "line 1.*single_object"),
        ("prompts/evaluation_metadata.jsonl", '{"prompt": "p"}', "line 1"),
        ("evaluation/object_names.txt", "bench", "does not list cow"),
        ("evaluation/object_names.txt", "b\xe9nch", "not UTF-8.*djghosh13/geneval"),
        (
            "prompts/evaluation_metadata.jsonl",
            '{"tag": "position", "prompt": "p", "include": [{"class": "cow", "count": 1, "position": ["above", 1]}]}',
            "line 1.*position of an earlier object",
        ),
    ],
)
def test_a_missing_or_foreign_file_is_named(name: str, line: str | None, words: str, chosen: GenEvalOptions) -> None:
    file = chosen.data / name
    if line is None:
        file.unlink()
    else:
        file.write_text(line + "\n", encoding="latin-1")
    with pytest.raises(BenchmarkError, match=f"(?s){words}"):
        GenEval(chosen, None)
