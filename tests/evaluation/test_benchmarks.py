"""Benchmarks behind one protocol: generation resumes and splits, scores repeat, cards compare only what is alike."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops

from tests.data.handmade import all_tasks, make_curriculum, write
from tests.data_pipeline.worlds import curriculum_of, write_in_process
from wemmu.config import ConfigError
from wemmu.config.benchmarks import FidelityOptions, ShapesOptions, from_pairs, options
from wemmu.config.schema import Data
from wemmu.config.task import Task
from wemmu.evaluation.benchmark import BenchmarkError, BenchmarkRequest, Judged, Mark
from wemmu.evaluation.card import compare, intervals, read_card
from wemmu.evaluation.fidelity.benchmark import Fidelity
from wemmu.evaluation.fidelity.measures import HIGHEST_DB, closer_to_target, identity, psnr, unasked
from wemmu.evaluation.fidelity.perceptual import LPIPS
from wemmu.evaluation.requests import held_out
from wemmu.evaluation.run_benchmark import run_benchmark, share
from wemmu.evaluation.shapes.benchmark import Shapes
from wemmu.locks import LockedError
from wemmu.sampling.request import Response
from wemmu.shapes.language import parse_caption
from wemmu.shapes.render import render
from wemmu.shapes.scene import COLORS, SHAPES, Object, Scene

SHAPES_OPTIONS = ShapesOptions(prompts=6, tasks=(Task.T2I,), batch=2, resamples=50)
MODEL = {"model": "a painter", "resolution": 64}


class Painter:
    """Draws scenes that satisfy the caption, the first `right` of them; counts what it is asked."""

    def __init__(self, right: int = 100, dies_after: int = 100):
        self.right, self.dies_after, self.keys = right, dies_after, list[str]()

    def open(self) -> Any:
        return self

    def __call__(self, requests: Sequence[BenchmarkRequest]) -> list[Response]:
        if len(self.keys) >= self.dies_after:
            raise KeyboardInterrupt
        images = []
        for request in requests:
            self.keys.append(request.key)
            number = int(request.key.rsplit("_", 1)[1])
            images.append(render(_scene(request.text), 64) if number < self.right else Image.new("RGB", (64, 64)))
        return list(map(Response, images))


def _scene(text: str) -> Scene:
    asked = next(ask for ask in _held_out() if ask.text == text)
    assert asked.target is not None
    assert parse_caption(text).satisfied_by(asked.target)
    return asked.target


def _held_out() -> list[Any]:
    source = held_out(Task.T2I, "test", 0)
    return [next(source) for _ in range(6)]


def _run(folder: Path, painter: Painter, **changes: Any) -> dict[str, Any] | None:
    settings = MODEL | changes.pop("settings", {})
    given = {"options": SHAPES_OPTIONS, "only": None} | changes
    return run_benchmark("shapes", given["options"], None, folder, painter.open, settings, given["only"])


def test_a_killed_generation_goes_on_with_what_is_missing_and_scoring_repeats_without_the_model(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "cut", Painter(4, dies_after=4))
    assert len(list((tmp_path / "cut" / "images").glob("*.png"))) == 4
    resumed = Painter(4)
    card = _run(tmp_path / "cut", resumed)
    whole = _run(tmp_path / "whole", Painter(4))
    assert len(resumed.keys) == 2
    assert card is not None
    assert whole is not None
    same = ("scores", "n", "units", "keys", "settings", "judges", "failures")
    assert [card[field] for field in same] == [whole[field] for field in same]
    assert card["scores"]["correct"]["value"] == pytest.approx(4 / 6)
    untouched = Painter(dies_after=0)
    again = _run(tmp_path / "cut", untouched, only="score")
    assert again is not None
    assert again["scores"] == card["scores"]
    page = (tmp_path / "cut" / "index.html").read_text(encoding="utf-8")
    assert "a painter" in page
    assert page.count('alt="generated"') == 6


def test_ranks_share_the_requests_and_scoring_waits_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    painters = [Painter(), Painter()]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        card = _run(tmp_path, painters[rank])
        # Rank 0 scores.
        assert (card is None) == (rank == 1)
        if rank == 1:
            monkeypatch.delenv("WORLD_SIZE")
            with pytest.raises(BenchmarkError, match="lacks 4 of 6 images"):
                _run(tmp_path, Painter(), only="score")
            monkeypatch.setenv("WORLD_SIZE", "2")
    assert not set(painters[0].keys) & set(painters[1].keys)
    monkeypatch.delenv("WORLD_SIZE")
    card = _run(tmp_path, Painter(dies_after=0))
    assert card is not None
    assert card["scores"]["correct"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_only_tasks_of_srun_share_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    # A batch script has the job's number of tasks, too, and runs alone.
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}.items():
        monkeypatch.setenv(name, value)
    assert share() == (0, 1)
    for name, value in {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}.items():
        monkeypatch.setenv(name, value)
    assert share() == (3, 4)


def test_a_folder_with_images_of_other_settings_is_refused(tmp_path: Path) -> None:
    _run(tmp_path, Painter())
    with pytest.raises(BenchmarkError, match=r"resolution was 64 and is 32.*--out"):
        _run(tmp_path, Painter(), settings={"resolution": 32})
    assert read_card(tmp_path)[0]["settings"]["resolution"] == 64


def test_images_are_not_replaced_while_another_process_works_with_them(tmp_path: Path) -> None:
    other = MODEL | {"resolution": 32}

    class Interrupted(Painter):
        """Other commands arrive before it generates."""

        def open(self) -> Any:
            with pytest.raises(LockedError, match="works with images of other settings"):
                run_benchmark("shapes", SHAPES_OPTIONS, None, tmp_path, Painter().open, other, replace=True)
            # As another rank.
            _run(tmp_path, Painter(), only="generate")
            return super().open()

    assert _run(tmp_path, Interrupted())
    assert run_benchmark("shapes", SHAPES_OPTIONS, None, tmp_path, Painter().open, other, replace=True)


def test_cards_compare_request_by_request_and_only_if_alike(tmp_path: Path) -> None:
    for name, right in (("a", 3), ("b", 5)):
        _run(tmp_path / name, Painter(right))
    found = compare(tmp_path / "a", tmp_path / "b" / "card.json", Shapes.headline)["correct"]
    assert (found["a"], found["b"]) == (pytest.approx(3 / 6), pytest.approx(5 / 6))
    assert found["difference"] == pytest.approx(2 / 6)
    # The model that is right on more requests is right on all of the other's, so the difference is never negative.
    assert 0 <= found["low"] <= found["difference"] <= found["high"]
    assert compare(tmp_path / "a", tmp_path / "a", Shapes.headline)["correct"]["high"] == 0
    _run(tmp_path / "fewer", Painter(), options=SHAPES_OPTIONS.model_copy(update={"prompts": 5}))
    with pytest.raises(BenchmarkError, match=r"cannot be compared.*n: 6 and 5"):
        compare(tmp_path / "a", tmp_path / "fewer", Shapes.headline)
    _run(tmp_path / "larger", Painter(), settings={"resolution": 32})
    with pytest.raises(BenchmarkError, match=r"settings\.resolution: 64 and 32"):
        compare(tmp_path / "a", tmp_path / "larger", Shapes.headline)
    card = json.loads((tmp_path / "b" / "card.json").read_text(encoding="utf-8"))
    (tmp_path / "b" / "card.json").write_text(json.dumps(card | {"judges": {"scorer": "another"}}), encoding="utf-8")
    with pytest.raises(BenchmarkError, match="judges"):
        compare(tmp_path / "a", tmp_path / "b", Shapes.headline)
    with pytest.raises(BenchmarkError, match="no result card"):
        compare(tmp_path / "a", tmp_path, Shapes.headline)


def test_the_interval_draws_units_not_images() -> None:
    def headline(marks: Sequence[Mark]) -> dict[str, float]:
        return {"mean": sum(m.values["v"] or 0 for m in marks) / len(marks)}

    few = [Mark(f"{u}_{i}", "c", str(u), {"v": float(u % 2)}) for u in range(10) for i in range(20)]
    many = [Mark(f"{u}_{i}", "c", f"{u}_{i}", {"v": float(u % 2)}) for u in range(10) for i in range(20)]
    wide, narrow = (intervals(headline, marks, 400)["mean"] for marks in (few, many))
    # sd of a share of 1/2: 0.5 / sqrt(n), for 10 units and 200.
    assert wide["high"] - wide["low"] == pytest.approx(2 * 1.96 * 0.5 / 10**0.5, rel=0.15)
    assert narrow["high"] - narrow["low"] == pytest.approx(2 * 1.96 * 0.5 / 200**0.5, rel=0.15)


def test_measures_of_fidelity_by_hand() -> None:
    x = torch.zeros(3, 16, 16)
    assert psnr(x, x) == pytest.approx(HIGHEST_DB)
    assert psnr(x, x + 0.1) == pytest.approx(20)
    assert psnr(x, x, torch.zeros(16, 16, dtype=torch.bool)) is None
    target = x.clone()
    target[:, 6:10, 6:10] = 1
    mask = unasked(x, target)
    assert int((~mask).sum()) == 8 * 8  # the change and two px around it
    assert identity(x, x, mask) == 1
    assert identity(x, x + 0.5, mask) == 0
    half = x.clone()
    half[:, :, 8:] = 1
    assert identity(x, half, mask) == pytest.approx(0.5)
    assert [closer_to_target(x, target, y) for y in (target, x)] == [1, 0]
    assert closer_to_target(x, x, x) is None


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fidelity") / "shards"
    write(root, all_tasks({Task.T2I: 12, Task.EDIT: 12}))
    return root


@pytest.mark.parametrize("kind", ["copies", "targets"])
def test_fidelity_tells_a_model_that_copies_from_one_that_edits(kind: str, shards: Path, tmp_path: Path) -> None:
    encoders = {name: Path("assets/shapes/encoders") / name for name in ("clip", "dino")}
    chosen = FidelityOptions(shards=shards, resolution=32, validation=3, encoders=encoders, resamples=20)
    targets = Fidelity(chosen, None)._targets

    def draw(requests: Sequence[BenchmarkRequest]) -> list[Response]:
        exact = [Image.fromarray((targets[r.key] * 255).byte().permute(1, 2, 0).numpy()) for r in requests]
        return list(map(Response, exact)) if kind == "targets" else [Response(r.images[0]) for r in requests]

    card = run_benchmark("fidelity", chosen, None, tmp_path, lambda: draw, MODEL)
    assert card is not None
    scores = {name: one["value"] for name, one in card["scores"].items()}
    assert scores["reconstruction/psnr"] == pytest.approx(HIGHEST_DB)
    assert scores["reconstruction/dino"] == pytest.approx(1, abs=1e-4)
    assert scores["edit/identity"] == 1
    assert scores["edit/follows"] == (kind == "targets")
    for name in ("psnr", "clip", "dino"):
        perfect = HIGHEST_DB if name == "psnr" else 1
        assert (scores[f"edit/{name}"] == pytest.approx(perfect, abs=1e-3)) == (kind == "targets")
    assert card["judges"].keys() == {"clip", "dino"}
    assert card["n"] == 6


def test_fidelity_tells_the_pixel_shift_of_each_size(tmp_path: Path) -> None:
    samples = {"reconstruction": 16, "t2i": 1}
    source = {"kind": "shapes", "samples": samples, "sizes": [[48, 80], [64, 64]]}
    write_in_process(curriculum_of(tmp_path / "shards", [source], mixture={"reconstruction": 0.5, "t2i": 0.5}))
    tasks = (Task.RECONSTRUCTION,)
    chosen = FidelityOptions(shards=tmp_path / "shards", resolution=64, validation=3, tasks=tasks, resamples=20)

    def moves_the_wide(requests: Sequence[BenchmarkRequest]) -> list[Response]:
        return [Response(ImageChops.offset(r.images[0], int(r.size == (48, 80)), 0)) for r in requests]

    card = run_benchmark("fidelity", chosen, None, tmp_path / "card", lambda: moves_the_wide, MODEL)
    assert card is not None
    shifts = {name: one["value"] for name, one in card["scores"].items() if "pixel shift" in name}
    assert shifts["reconstruction/pixel shift 48x80"] == pytest.approx(1, abs=0.05)
    assert shifts["reconstruction/pixel shift 64x64"] == pytest.approx(0, abs=0.01)
    assert shifts["reconstruction/pixel shift"] == pytest.approx(0.5, abs=0.05)


def test_fidelity_of_records_that_were_trained_on_is_refused(shards: Path) -> None:
    with pytest.raises(BenchmarkError, match="trained on every record"):
        Fidelity(FidelityOptions(), make_curriculum(shards).stage_run("only"))
    held = make_curriculum(shards).model_copy(update={"data": Data(shards=shards, validation=2)})
    assert len(Fidelity(FidelityOptions(), held.stage_run("only")).requests()) == 4
    with pytest.raises(BenchmarkError, match="validation needs shards=DIR"):
        Fidelity(FidelityOptions(validation=3), held.stage_run("only"))
    with pytest.raises(BenchmarkError, match="shards=DIR"):
        Fidelity(FidelityOptions(), None)


@pytest.mark.parametrize(
    ("name", "pairs", "words"),
    [
        ("gen_eval", [], r"did you mean geneval\? valid choices: shapes"),
        ("shapes", ["prompt=3"], r"prompt: unknown field; did you mean prompts\?.*Options.*prompts"),
        ("shapes", ["prompts=none"], "prompts"),
        ("shapes", ["prompts"], "NAME=VALUE"),
        ("fidelity", ["encoders=clip"], "encoders"),
        ("shapes", ["prompts=3", "prompts.x=1"], "prompts: Input should be a valid integer"),
        ("shapes", ["prompts={"], "cannot be read"),
        # The parser would crash the process.
        ("shapes", ["prompts=" + "[" * 60_000], "nested too deeply"),
    ],
)
def test_invalid_options_name_the_valid_ones(name: str, pairs: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        options(name, from_pairs(pairs))


def test_the_command_ends_with_a_sentence_and_78(tmp_path: Path) -> None:
    # An empty folder would be refused for that.
    (tmp_path / "image.png").touch()
    command = [sys.executable, "-m", "wemmu.evaluate", str(tmp_path), "--benchmark", "shapes", "--set", "prompts=0"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 78
    assert "prompts" in done.stderr
    assert "Traceback" not in done.stderr


def test_images_of_another_program_are_scored_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    benchmark = Shapes(SHAPES_OPTIONS, None)
    for request, answer in zip(benchmark.requests(), Painter(3)(benchmark.requests()), strict=True):
        answer.image.save(tmp_path / "theirs" / f"{request.key}.png")
    card = run_benchmark("shapes", SHAPES_OPTIONS, None, tmp_path / "out", tmp_path / "theirs", MODEL)
    assert card is not None
    assert card["scores"]["correct"]["value"] == 0.5
    # Another program's images under the same names must not get the score of the first ones.
    image = next((tmp_path / "theirs").glob("*.png"))
    Image.new("RGB", (64, 64), "tan").save(image)
    with pytest.raises(BenchmarkError, match=r"other settings \(images"):
        run_benchmark("shapes", SHAPES_OPTIONS, None, tmp_path / "out", tmp_path / "theirs", MODEL)
    image.write_bytes(image.read_bytes()[:50])
    with pytest.raises(BenchmarkError, match=f"{image.name} cannot be read as an image"):
        run_benchmark("shapes", SHAPES_OPTIONS, None, tmp_path / "broken", tmp_path / "theirs", MODEL)
    with pytest.raises(BenchmarkError, match="name no image to score"):
        run_benchmark("shapes", ShapesOptions(tasks=()), None, tmp_path / "none", lambda: Painter(0), MODEL)
    image.unlink()
    with pytest.raises(BenchmarkError, match="1 of 6 images are missing"):
        run_benchmark("shapes", SHAPES_OPTIONS, None, tmp_path / "new", tmp_path / "theirs", MODEL)


def test_a_painted_scene_is_scored_by_its_task() -> None:
    scenes = {"right": Scene("white", (Object(0, SHAPES[0], next(iter(COLORS)), "large"),))}
    benchmark = Shapes(ShapesOptions(prompts=1, tasks=(Task.RECONSTRUCTION,)), None)
    (request,) = benchmark.requests()
    assert request.task is Task.RECONSTRUCTION
    images = [Judged(request, request.images[0]), Judged(request, render(scenes["right"], 64))]
    assert [values["same"] for values in benchmark.judge(images)] == [1, 0]


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AlexNet with random weights, named as torchvision names its file: by the beginning of its SHA-256."""
    from torchvision.models import alexnet

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "weights.pth"
    # LPIPS uses the features alone.
    torch.save({n: v for n, v in alexnet().state_dict().items() if n.startswith("features.")}, file)
    return file.rename(file.with_name(f"alexnet-owt-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth"))


def test_lpips_is_the_packages_with_the_named_weights(alexnet: Path, tmp_path: Path) -> None:
    ours = LPIPS(alexnet)
    x, y = torch.rand(2, 3, 32, 32)
    # The definition: unit features, squared differences, weighted by the package's linear layers, averaged, added up.
    net, weights = ours._loaded(), torch.load(alexnet)
    assert torch.equal(net.net.slice5[0].weight, weights["features.10.weight"])
    total = 0.0
    for layer, (a, b) in enumerate(zip(*(net.net(net.scaling_layer(2 * i[None] - 1)) for i in (x, y)), strict=True)):
        a, b = (f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (a, b))
        total += (net.lins[layer].model[1].weight * (a - b).square()).sum(1).mean().item()
    assert ours(x, y) == pytest.approx(total, rel=1e-4)
    assert ours(x, x) == 0 < ours(x, 0.9 * x) < ours(x, y)
    damaged = tmp_path / alexnet.name
    damaged.write_bytes(alexnet.read_bytes()[:-1])
    with pytest.raises(BenchmarkError, match="its SHA-256 begins with"):
        LPIPS(damaged)
    with pytest.raises(BenchmarkError, match=r"valid: alexnet-owt-7be5be79\.pth"):
        LPIPS(tmp_path / "vgg19-dcbb9e9d.pth")


def test_fidelity_measures_lpips_if_its_weights_are_named(alexnet: Path, shards: Path, tmp_path: Path) -> None:
    chosen = FidelityOptions(shards=shards, resolution=32, validation=3, lpips=alexnet, resamples=20)
    copies = lambda requests: [Response(request.images[0]) for request in requests]  # noqa: E731
    card = run_benchmark("fidelity", chosen, None, tmp_path, lambda: copies, MODEL)
    assert card is not None
    scores = {name: one["value"] for name, one in card["scores"].items()}
    assert scores["reconstruction/lpips"] < 1e-3 < scores["edit/lpips"]
    assert card["judges"]["lpips"]["trunk"] == "alex"
