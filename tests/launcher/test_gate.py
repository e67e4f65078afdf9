"""A stage begins only when what the one before left is what it should be."""

import dataclasses
import json
from pathlib import Path

import pytest

from launcher.gate import Gate, reasons
from wemmu.config.benchmarks import card_file
from wemmu.config.stage import BenchmarkGate

METRICS = [{"step": 4, "loss": 0.9}, {"step": 8, "loss": 0.5}, {"step": 8, "images": 3, "blank_images": 0}]


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """One that holds."""
    checkpoint = tmp_path / "checkpoints" / "step_00000008"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights.distcp").write_text("x")
    tensors = {"bridge.pathway.layers.0.weight": [1], "dit.proj.weight": [1]}
    write(checkpoint / "manifest.json", {"step": 8, "tensors": tensors, "files": {"weights.distcp": "ab12"}})
    record(tmp_path, METRICS)
    share = {"share": 0.6, "successes": 6, "count": 10}
    tasks = {"t2i": {"test": {"measures": {"satisfied": share, "readable": {"share": 1.0}}}}}
    write(tmp_path / "evaluation.json", {"tasks": tasks})
    return Gate(
        "a",
        tmp_path,
        checkpoint / "manifest.json",
        {"pathway": ("bridge.pathway.",), "dit": ("dit.",)},
        0.5,
        {"t2i": 0.6},
    )


def write(file: Path, values: object) -> None:
    file.write_text(json.dumps(values))


def record(folder: Path, lines: list[dict]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')


def test_a_good_stage_passes(gate: Gate):
    assert reasons(gate) == []


def test_a_module_that_was_trained_and_is_not_there(gate: Gate):
    write(gate.manifest, {"step": 8, "tensors": {"dit.proj.weight": [1]}, "files": {}})
    [why] = reasons(gate)
    assert "trained pathway, but" in why


@pytest.mark.parametrize("content", [None, "", '{"tens', "[]"])
def test_a_manifest_that_is_not_there_or_torn(gate: Gate, content: str | None):
    gate.manifest.unlink() if content is None else gate.manifest.write_text(content)
    assert "no whole checkpoint of its last step" in reasons(gate)[0]


def test_an_earlier_checkpoint_under_the_name_of_the_last_one_does_not_pass(gate: Gate):
    gate.manifest.write_text(gate.manifest.read_text().replace('"step": 8', '"step": 4'))
    assert "holds step 4: a has not ended" in reasons(gate)[0]


def test_a_file_of_the_checkpoint_that_is_gone(gate: Gate):
    (gate.manifest.parent / "weights.distcp").unlink()
    assert "lacks weights.distcp" in reasons(gate)[0]


@pytest.mark.parametrize(
    ("loss", "said"), [(float("nan"), "not finite"), (float("inf"), "not finite"), (0.6, "gate.max_loss is 0.5")]
)
def test_a_loss_that_is_none_or_too_high(gate: Gate, loss: float, said: str):
    record(gate.folder, [*METRICS, {"step": 12, "loss": loss}])
    [why] = reasons(gate)
    assert said in why


def test_no_record_at_all(gate: Gate):
    (gate.folder / "metrics.jsonl").unlink()
    assert "has no loss in" in reasons(gate)[0]


def test_blank_images_of_the_last_drawing(gate: Gate):
    blank = {"step": 8, "images": 3, "blank_images": 2}
    record(gate.folder, [blank, *METRICS])
    assert reasons(gate) == []
    record(gate.folder, [*METRICS, blank])
    assert "2 of the 3 sample images of a at step 8 are blank" in reasons(gate)[0]
    # As earlier versions wrote it.
    record(gate.folder, [*METRICS, {"step": 8, "pictures": 3, "blank_pictures": 2}])
    assert "2 of the 3 sample images of a at step 8 are blank" in reasons(gate)[0]


def test_a_score_that_is_too_low_or_unknown(gate: Gate):
    higher = Gate(gate.stage, gate.folder, gate.manifest, gate.modules, None, {"t2i": 0.61})
    assert reasons(higher) == ["a answered 0.60 of t2i (6 of 10); its gate asks for 0.61."]
    (gate.folder / "evaluation.json").unlink()
    assert "does not tell them" in reasons(gate)[0]


@pytest.mark.parametrize(
    ("bound", "said"),
    [
        ({}, ""),
        ({"at_least": 20.5}, ""),
        ({"at_least": 20.6}, "a has psnr 20.5 in fidelity; its gate asks for 20.6 or more."),
        ({"score": "edit/follows", "at_least": 0.3}, "a has edit/follows 0.25 in fidelity"),
        ({"score": "edit/lpips", "at_least": 0.0, "at_most": 0.2}, "edit/lpips 0.3 in fidelity; its gate asks for 0.2"),
        ({"score": "edit/lost", "at_least": 0.0}, "edit/lost nan"),
        ({"score": "ssim", "at_least": 0.3}, "a has a gate on ssim of fidelity; the scores in"),
        ({"benchmark": "wise", "at_least": 0.3}, "wise/card.json has no scores (FileNotFoundError"),
    ],
)
def test_a_gate_on_a_benchmark(gate: Gate, bound: dict, said: str):
    values = {"psnr": 20.5, "edit/follows": 0.25, "edit/lpips": 0.3, "edit/lost": float("nan")}
    file = card_file(gate.folder, "fidelity")
    file.parent.mkdir(parents=True)
    write(file, {"scores": {name: {"value": value, "low": 0, "high": 99} for name, value in values.items()}})
    bounds = (BenchmarkGate(**{"benchmark": "fidelity", "at_least": 0.0} | bound),)
    found = reasons(dataclasses.replace(gate, benchmarks=bounds))
    assert len(found) == bool(said)
    assert said in "".join(found)
