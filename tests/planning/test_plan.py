"""The plan as a whole, its cache, and the command."""

import json
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from tests.models import published
from tests.planning.worlds import MINIATURE, PAPER, ROOT, curriculum_with, in_this_process, on, write_published
from wemmu.command_line import UsageError
from wemmu.config import Curriculum, load_curriculum
from wemmu.config.schema import Backbones
from wemmu.measuring.__main__ import measure
from wemmu.planning import ask as asking
from wemmu.planning.ask import Item, PlanError, ask, configs_of
from wemmu.planning.plan import (
    GPUS,
    Assumptions,
    Machine,
    above_memory,
    check_degrees,
    loader_threads,
    parameters_of,
    plan,
    starving,
)
from wemmu.planning.tables import _gpu
from wemmu.readable import human


def short(backbones: Backbones, *overrides: str) -> Curriculum:
    """The miniature's first stage, with one task."""
    curriculum = curriculum_with(MINIATURE, backbones, "stages.stage1.mixture={t2i: 1.0}", *overrides)
    return curriculum.model_copy(update={"stages": curriculum.stages[:1]})


@pytest.mark.slow
def test_time_is_work_over_rate_and_splitting_the_dit_changes_memory_alone(backbones: Backbones):
    curriculum = short(backbones)
    (stage,) = plan(curriculum, on(2, mfu=0.4), Assumptions(20)).stages
    assert stage.samples_per_s == pytest.approx(2 * 0.4 * 989e12 / stage.flops)
    assert stage.gpu_hours == pytest.approx(stage.samples * stage.flops / (0.4 * 989e12) / 3600)
    assert stage.gpu_hours == pytest.approx(2 * stage.hours)
    assert set(stage.traffic) == {"all_gather over 2", "reduce_scatter over 2"}
    (split,) = plan(curriculum, on(2, tp=2, mfu=0.4), Assumptions(20)).stages
    assert (split.flops, split.idle) == (stage.flops, 0)
    assert split.gpu_memory["activations"] < stage.gpu_memory["activations"]
    assert "all_reduce over 2" in split.traffic
    # All that can be trained is shared by the ranks, and nothing else.
    (alone,) = plan(curriculum, on(1), Assumptions(20)).stages
    assert stage.gpu_memory["moments"] == alone.gpu_memory["moments"] / 2
    assert stage.gpu_memory["frozen weights"] > alone.gpu_memory["frozen weights"] / 2
    assert stage.gpu_total_checkpointed < stage.gpu_total


@pytest.mark.slow
def test_the_curriculum_for_one_card_leaves_a_tenth_of_its_24_gb(tmp_path: Path):
    """At 1024 px, with the largest of its tasks."""
    curriculum = curriculum_with(ROOT / "configs/curriculum/one-gpu-24gb.yaml", write_published(tmp_path))
    stage = curriculum.stages[-1]
    largest = stage.model_copy(update={"mixture": {"edit": 1.0}})
    assert (stage.resolution, "edit" in stage.mixture) == (1024, True)
    (planned,) = plan(
        curriculum.model_copy(update={"stages": (largest,)}), replace(on(1), gpu="rtx4090"), Assumptions()
    ).stages
    assert planned.gpu_total_checkpointed < 0.9 * GPUS["rtx4090"].memory


def test_a_stage_is_flagged_exactly_where_it_exceeds_the_gpu(backbones: Backbones, monkeypatch: pytest.MonkeyPatch):
    planned = plan(short(backbones), on(1), Assumptions(20))
    kept, again = planned.stages[0].gpu_total, planned.stages[0].gpu_total_checkpointed

    def flagged(room: float, checkpointing: bool = False) -> list[str]:
        monkeypatch.setitem(GPUS, "h100", replace(GPUS["h100"], memory=room))
        told = replace(planned, checkpointing=checkpointing)
        # The table marks the peak of what the curriculum asks for, and no other.
        peaks = {row[0]: "(!)" in row[1] for row in _gpu(told) if row[0].startswith("GPU peak")}
        assert peaks.pop("GPU peak, checkpointing" if checkpointing else "GPU peak") == bool(above_memory(told))
        assert not any(peaks.values())
        return above_memory(told)

    assert flagged(kept) == flagged(again, checkpointing=True) == []
    assert re.match(r"stage1 needs .*; with memory.checkpointing: true it is", *flagged(kept - 1))
    assert re.match(r"stage1 needs .*, with memory.checkpointing: true still", *flagged(again - 1))
    assert "checkpointing" not in flagged(again - 1, checkpointing=True)[0]


def test_a_stage_whose_loader_is_too_slow_says_how_many_threads_it_needs(backbones: Backbones):
    planned = plan(short(backbones), on(1), Assumptions(20))
    (stage,) = planned.stages
    # One image to a sample.
    needed = stage.loader_threads
    assert needed == loader_threads(stage.samples_per_s, 1, 32) > 1
    assert starving(replace(planned, workers=needed)) == []
    assert starving(replace(planned, workers=needed - 1))[0].endswith(f"set data.workers={needed}")
    # As many samples with three images each, and at twice the side.
    assert loader_threads(160.0, 1, 1024) == 1
    assert loader_threads(160.0, 3, 1024) == 3
    assert loader_threads(160.0, 3, 2048) == 12


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"world": 65, "tp": 5, "pp": 2}, "not a multiple of tp x pp = 10; valid nearby: 60 or 70"),
        ({"world": 0}, "not a multiple of tp x pp = 1; valid nearby: 1"),
        # What divides the batches of all four stages.
        ({"world": 20, "tp": 2}, "2304 is not a multiple of the 20 ranks; valid worlds for all"),
    ],
)
def test_worlds_that_cannot_be_are_refused_with_those_that_can(degrees: dict[str, int], message: str):
    with pytest.raises(PlanError) as refusal:
        check_degrees(load_curriculum(PAPER), on(**degrees).degrees)
    assert message in str(refusal.value)


def test_the_papers_own_batches_do_not_fit_64_gpus_but_8():
    own = ["parallel.ranks=8", "stages.stage1.global_batch=2336", "stages.stage2.global_batch=584"]
    curriculum = load_curriculum(PAPER, own)
    with pytest.raises(PlanError, match=r"worlds for all stages with tp x pp = 1: 1, 2, 4, 8$"):
        check_degrees(curriculum, on(64).degrees)
    check_degrees(curriculum, on(8).degrees)


def test_a_machine_that_is_none_is_refused(backbones: Backbones):
    with pytest.raises(UsageError, match=rf"did you mean h100\? valid choices: {', '.join(GPUS)}"):
        plan(short(backbones), Machine("h1000", on(1).degrees, 0.3), Assumptions())
    with pytest.raises(UsageError, match="--mfu 35 is not a share above 0 and at most 1"):
        plan(short(backbones), on(1, mfu=35), Assumptions())


def test_a_recipe_without_the_hybrid_engine_is_not_split():
    with pytest.raises(PlanError, match="need engine hybrid: the recipe uae does not run on engine hybrid"):
        check_degrees(load_curriculum(ROOT / "configs/shapes/uae.yaml"), on(2, tp=2).degrees)


def test_an_absent_backbone_is_planned_by_its_published_name_or_the_known_names_are_listed(tmp_path: Path):
    paper = load_curriculum(PAPER)
    _, absent = configs_of(paper.stage_run("stage1"))
    assert [path.name for path in absent] == ["Qwen2.5-VL-3B-Instruct", "vae", "transformer"]
    parts = parameters_of(paper)["parts"]
    assert parts["vision"] + parts["language"] == published.QWEN_PARAMETERS
    assert (parts["dit"], parts["vae"]) == (published.SANA_PARAMETERS, published.DCAE_PARAMETERS)
    with pytest.raises(PlanError, match=r"Qwen2-VL is none of .*Qwen2\.5-VL-7B-Instruct, .*dc-ae-f32c32"):
        parameters_of(paper.changed({"backbones.vlm": tmp_path / "Qwen2-VL"}))
    # A directory that is there is read, whatever its name.
    (here := tmp_path / "Qwen2.5-VL-3B-Instruct").mkdir()
    with pytest.raises(PlanError, match=r"Qwen2\.5-VL-3B-Instruct/config\.json is needed"):
        parameters_of(paper.changed({"backbones.vlm": here}))


def test_answers_are_kept_by_all_that_they_depend_on(
    backbones: Backbones, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WEMMU_CACHE", str(tmp_path))
    measured: list[str] = []

    def watched(folder: Path, item: dict) -> dict:
        measured.append(item["kind"])
        return measure(folder, item)

    def asked(*overrides: str) -> int:
        run = short(backbones, *overrides).stage_run("stage1")
        before = len(measured)
        assert ask([Item("parameters", run)])[0]["parts"]["pathway"]
        return len(measured) - before

    monkeypatch.setattr(asking, "_child", in_this_process(watched))
    assert asked() == 1
    # Where there is an answer no child is started.
    monkeypatch.setattr(subprocess, "Popen", None)
    assert ask([Item("parameters", short(backbones).stage_run("stage1"))])
    assert asked("stages.stage1.steps=5000", "seed=3", "stages.stage1.optimizer.lr=1.0") == 0
    assert asked("recipe.bridge.position_table=8") == 1
    # What was cut short is measured again.
    next((tmp_path / "measured").glob("*.json")).write_text('{"parts')
    assert asked() + asked("recipe.bridge.position_table=8") == 1
    next((tmp_path / "measured").glob("*.json")).write_text("[1]")
    assert asked() + asked("recipe.bridge.position_table=8") == 1
    monkeypatch.setattr(asking, "_versions", lambda: ["torch 99"])
    assert asked() == 1
    # A cache that cannot be used costs time.
    (tmp_path / "file").touch()
    monkeypatch.setenv("WEMMU_CACHE", str(tmp_path / "file"))
    assert asked() + asked() == 2


def test_what_may_change_an_answer_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The process that measures may import what the contract puts on its own floor or below."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = [re.split(r"[ |:]+", layer) for layer in project["tool"]["importlinter"]["contracts"][0]["layers"]]
    above = {room for layer in layers[: layers.index(["measuring"])] for room in layer}
    monkeypatch.setattr(asking, "__file__", str(tmp_path / "planning" / "ask.py"))

    def key_changes(name: str) -> bool:
        file, before = tmp_path / name, asking._versions.__wrapped__()
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"# {name}")
        return asking._versions.__wrapped__() != before

    rooms = [file.name for file in (ROOT / "wemmu").iterdir() if (file / "__init__.py").exists()]
    kept = {room for room in rooms if not key_changes(f"{room}/some.py")}
    assert kept == (above & set(rooms)) | {"planning", "report"}
    assert key_changes("noise.py")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = (
        "import sys, runpy; sys.argv = ['plan', *sys.argv[1:]];"
        "\ntry: runpy.run_module('wemmu.plan', run_name='__main__')"
        "\nfinally: print('heavy:', sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    return subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_the_command_plans_ross_without_torch_by_a_child_and_then_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WEMMU_CACHE", str(tmp_path))
    first, second = (command("configs/shapes/ross.yaml", "--json") for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert "measuring the model" in first.stderr
    assert second.stderr == "heavy: []\n"
    told = json.loads(first.stdout)
    assert told == json.loads(second.stdout)
    assert set(told["stages"][0]["by_task"]["understanding"]) == {"vision", "projector", "llm", "vae", "head"}
    # Where the language model learns, every product with a weight costs twice as much back as forward.
    forward, backward = told["stages"][1]["by_task"]["understanding"]["llm"]
    assert backward == pytest.approx(2 * forward, rel=0.01)
    shown = command("configs/shapes/ross.yaml")
    for part in ("tune", "GPU-hours", "checkpoint on disk", "Assumed: 128 tokens", "projector"):
        assert part in shown.stdout


@pytest.mark.slow
def test_what_cannot_be_measured_ends_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WEMMU_CACHE", str(tmp_path))
    done = command("configs/shapes/curriculum.yaml", "--set", "recipe.bridge.position_table=1")
    assert done.returncode == 78
    assert "bridge.position_table = 1" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_papers_last_stage_is_what_was_worked_out_by_hand():
    paper = load_curriculum(PAPER, ["stages.stage4.mixture={multi_edit: 1.0}"])
    (stage4,) = plan(paper.model_copy(update={"stages": paper.stages[3:]}), on(64), Assumptions()).stages
    flops = {part: sum(both) / 1e12 for part, both in stage4.by_task["multi_edit"].items()}
    # Qwen2.5-VL-3B on 128 + 2 x 37^2 tokens with all pairs of attention; the pathway on 3 x 37^2 that see 128 + 2 x
    # 37^2 more; Sana on 32^2 latents and 37^2 tokens of the condition; encodings of 1024 and of two times 1184 px.
    layer = 2048 * (2 * 2048 + 2 * 256 + 3 * 11008)
    prompt, way = 128 + 2 * 37**2, 3 * 37**2
    language = 2 * prompt * (35 * layer + 2048 * 2560) + 35 * 4 * prompt**2 * 2048
    pathway = 3 * (2 * way * 36 * layer + 36 * 4 * way * (prompt + way) * 2048)
    assert flops["language"] == pytest.approx(language / 1e12, rel=0.01)
    assert flops["pathway"] == pytest.approx(pathway / 1e12, rel=0.01)
    assert flops["dit"] == pytest.approx(10.84, rel=0.01)
    assert flops["vae"] == pytest.approx(5.18 * (1 + 2 * (1184 / 1024) ** 2), rel=0.01)
    # 4.38 B trained parameters: float32 weights and moments.
    assert stage4.checkpoint == pytest.approx(12 * 4.4e9, rel=0.01)
    assert stage4.gpu_total > 80e9 > stage4.gpu_total_checkpointed
    # The autoencoder has the two input images of all samples at once.
    assert stage4.gpu_memory["encoders at work"] == pytest.approx(15.5e9, rel=0.02)


def test_numbers_are_written_with_three_digits():
    assert [human(v, "B") for v in (0, 999, 999.6, 7_509_000_000)] == ["0 B", "999 B", "1 kB", "7.51 GB"]
    assert human(79_400_000) == "79.4 M"
