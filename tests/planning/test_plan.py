"""The plan as a whole, and the command."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.planning.worlds import PAPER, ROOT, curriculum_with, on
from wemmu.config import load_curriculum
from wemmu.config.schema import Backbones
from wemmu.planning.backbones import PlanError, read_sizes
from wemmu.planning.flops import Assumptions
from wemmu.planning.plan import GPUS, Machine, above_memory, plan
from wemmu.readable import human


def test_the_papers_curriculum_can_be_planned_on_64_gpus(published: Backbones):
    stages = plan(curriculum_with(PAPER, published), on(64), Assumptions()).stages
    assert [s.samples / 1e6 for s in stages] == pytest.approx([79.4, 25.7, 20.0, 4.3], rel=0.003)
    assert [s.micro_batch * s.accumulation * 64 for s in stages] == [2304, 576, 576, 576]


def test_time_is_work_over_rate(published: Backbones):
    curriculum = curriculum_with(PAPER, published)
    stage = plan(curriculum, on(64, mfu=0.4), Assumptions()).stages[0]
    assert stage.samples_per_s == pytest.approx(64 * 0.4 * 989e12 / stage.flops)
    assert stage.gpu_hours == pytest.approx(stage.samples * stage.flops / (0.4 * 989e12) / 3600)
    assert stage.gpu_hours == pytest.approx(64 * stage.hours)
    # Sharding the DiT changes memory, not work.
    split = plan(curriculum, on(64, tp=4, pp=2, mfu=0.4), Assumptions()).stages[0]
    assert split.flops == stage.flops


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"world": 63, "tp": 3}, "the 5600 channels of the DiT's feed-forward"),
        ({"world": 64, "tp": 32}, "not outnumber its heads; valid: 1, 2, 4, 5, 7, 8, 10, 14, 16, 20"),
        ({"world": 64, "pp": 21}, "20 blocks, so pp can be 1 to 20, got 21"),
        ({"world": 65, "tp": 5, "pp": 2}, "not a multiple of tp x pp = 10; valid nearby: 60 or 70"),
        ({"world": 0}, "not a multiple of tp x pp = 1; valid nearby: 1"),
        # What divides the batches of all four stages.
        ({"world": 20, "tp": 2}, "2304 is not a multiple of the 20 ranks; valid worlds for all"),
    ],
)
def test_degrees_that_cannot_be_are_refused_with_those_that_can(
    published: Backbones, degrees: dict[str, int], message: str
):
    with pytest.raises(PlanError) as refusal:
        plan(curriculum_with(PAPER, published), on(**degrees), Assumptions())
    assert message in str(refusal.value)


def test_the_papers_own_batches_do_not_fit_64_gpus_but_8(published: Backbones):
    own = ["parallel.ranks=8", "stages.stage1.global_batch=2336", "stages.stage2.global_batch=584"]
    curriculum = curriculum_with(PAPER, published, *own)
    with pytest.raises(PlanError, match=r"worlds for all stages with tp x pp = 1: 1, 2, 4, 8$"):
        plan(curriculum, on(64), Assumptions())
    assert plan(curriculum, on(8), Assumptions()).stages[0].global_batch == 2336


def test_a_machine_that_is_none_is_refused(published: Backbones):
    curriculum = curriculum_with(PAPER, published)
    degrees = on(64).degrees
    with pytest.raises(PlanError, match=f"valid choices: {', '.join(GPUS)}"):
        plan(curriculum, Machine("h1000", degrees, 0.3), Assumptions())
    with pytest.raises(PlanError, match="above 0 and at most 1, got 35"):
        plan(curriculum, Machine("h100", degrees, 35), Assumptions())


def test_a_config_that_is_missing_or_wrong_is_named(published: Backbones, tmp_path: Path):
    with pytest.raises(PlanError, match=r"nowhere/config\.json.*not the weights"):
        read_sizes(published.model_copy(update={"vlm": tmp_path / "nowhere"}))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl", "vision_config": {"depth": 3}}')
    with pytest.raises(PlanError, match=r"vision_config\.hidden_size"):
        read_sizes(published.model_copy(update={"vlm": tmp_path}))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "wemmu.plan", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_the_command_plans_the_miniature_without_torch():
    script = (
        "import runpy, sys; sys.argv = ['plan', 'configs/shapes/curriculum.yaml', '--world', '1'];"
        "\ntry: runpy.run_module('wemmu.plan', run_name='__main__')"
        "\nfinally: print('heavy:', sorted({'torch', 'numpy', 'transformers', 'diffusers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert "heavy: []" in done.stdout
    for told in ("stage4", "GPU-hours", "checkpoint on disk", "Assumed: 128 tokens"):
        assert told in done.stdout


def test_json_has_every_number(published: Backbones):
    where = [f"--set=backbones.vlm={published.vlm}", f"--set=backbones.sana={published.sana}"]
    done = command(str(PAPER), "--world", "64", "--json", *where)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["machine"] == {"gpu": "h100", "degrees": {"world": 64, "tp": 1, "pp": 1}, "mfu": 0.35}
    assert told["assumptions"]["prompt_tokens"] == 128
    assert told["stages"][0]["by_task"]["t2i"]["pathway"]["forward"] == pytest.approx(1.841e12, rel=0.001)


def test_a_missing_backbone_is_an_answer_not_a_traceback():
    done = command(str(PAPER), "--world", "64", "--set=backbones.vlm=backbones/Qwen2.5-VL-7B-Instruct")
    assert done.returncode == 78
    assert "backbones/Qwen2.5-VL-7B-Instruct/config.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_published_backbones_that_are_not_here_are_planned_by_their_names_and_said_to_be(published: Backbones):
    here = plan(curriculum_with(PAPER, published), on(64), Assumptions())
    there = plan(load_curriculum(PAPER), on(64), Assumptions())
    assert (there.parameters, there.stages) == (here.parameters, here.stages)
    assert there.packaged == ("backbones/Qwen2.5-VL-3B-Instruct", "backbones/Sana_1600M_1024px_diffusers")
    done = command(str(PAPER), "--world", "64")
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stdout.split())
    assert "Not here, so by the published sizes of their names: backbones/Qwen2.5-VL-3B-Instruct" in told
    assert re.search(r"\(!\) stage4 needs [89]\d\.\d GB of the 80 GB", told)


def test_a_directory_that_is_there_is_read_whatever_its_name(tmp_path: Path):
    (tmp_path / "Qwen2.5-VL-3B-Instruct").mkdir()
    with pytest.raises(PlanError, match=r"Qwen2\.5-VL-3B-Instruct/config\.json"):
        read_sizes(Backbones(vlm=tmp_path / "Qwen2.5-VL-3B-Instruct", sana=tmp_path / "Sana_1600M_1024px_diffusers"))


def test_a_stage_is_flagged_exactly_where_it_exceeds_the_gpu(published: Backbones):
    def flagged(*overrides: str, gpu: str = "h100") -> list[str]:
        curriculum = curriculum_with(PAPER, published, *overrides)
        return above_memory(plan(curriculum, Machine(gpu, on(64).degrees, 0.35), Assumptions()))

    (stage4,) = flagged()
    assert re.match(
        r"stage4 needs [89]\d\.\d GB of the 80 GB that GPUs of the kind h100 have; with memory.check", stage4
    )
    assert flagged("memory.checkpointing=true") == flagged("memory.micro_batch=1") == flagged(gpu="h200") == []
    crowded = flagged("memory.checkpointing=true", "memory.micro_batch=64", "stages.stage4.global_batch=64000")
    assert crowded
    assert "checkpointing" not in crowded[-1]


def test_numbers_are_written_with_three_digits():
    assert [human(v, "B") for v in (0, 999, 999.6, 7_509_000_000)] == ["0 B", "999 B", "1 kB", "7.51 GB"]
    assert human(79_400_000) == "79.4 M"
