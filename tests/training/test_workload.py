"""The work that a micro-batch is said to be is the work that the model does, and the tokens are those it sees."""

from pathlib import Path

import pytest

from tests.models.flops import FlopCounter
from tests.models.world import make_batch
from tests.training.runs import make_run
from wemmu.config.schema import Backbones
from wemmu.config.task import Task
from wemmu.planning.plan import GPUS
from wemmu.prompts import PromptEncoder
from wemmu.recipes.wemmu.loss import FlowMatchingLoss
from wemmu.recipes.wemmu.model import WeMMU
from wemmu.training.workload import Workload, peak_of


@pytest.mark.parametrize(
    ("task", "size"), [(Task.T2I, (32, 32)), (Task.EDIT, (32, 32)), (Task.MULTI_EDIT, (32, 32)), (Task.T2I, (16, 64))]
)
def test_the_model_does_the_counted_work(
    model: WeMMU, encoder: PromptEncoder, backbones: Backbones, task: Task, size: tuple[int, int]
):
    run = make_run(backbones, Path("shards"))
    # Ids whose prompts are of one length, so that nothing is padded.
    batch = make_batch(encoder, [0, 4], task, size)
    counted = Workload(run).count([batch])
    model.freeze_all_but(run.stage.trains)
    with FlopCounter() as counter:
        FlowMatchingLoss(model, run)(batch, 0).values.sum().backward()
    model.zero_grad()
    assert counted["flops"] == pytest.approx(counter.flops, rel=0.01)
    assert counted[task] == 2


def test_tokens_are_those_of_prefix_pathway_and_latents_without_padding(encoder: PromptEncoder, backbones: Backbones):
    workload = Workload(make_run(backbones, Path("shards")))
    # Prompts of two lengths.
    batch = make_batch(encoder, [0, 1], Task.EDIT, (32, 32))
    prompt = int(batch.prompts.mask.sum())
    assert prompt < batch.prompts.input_ids.numel()
    pathway = 2 * (2 * 2 + 2 * 2)  # tokens of 16 px: the input image and the queries
    latents = 2 * 2 * 2  # of 16 px
    # The mean length of a prompt is taken as a whole number.
    assert workload.count([batch])["tokens"] == pytest.approx(prompt + pathway + latents, abs=1)
    assert workload.count([batch])["padding"] == batch.prompts.input_ids.numel() - prompt
    assert workload.count([batch, batch])["tokens"] == 2 * workload.count([batch])["tokens"]


def test_backbones_of_unknown_shape_are_told_of_and_samples_still_counted(
    encoder: PromptEncoder, backbones: Backbones, tmp_path: Path
):
    elsewhere = backbones.model_copy(update={"vlm": tmp_path})
    workload = Workload(make_run(elsewhere, Path("shards")))
    assert str(tmp_path) in workload.unknown
    assert dict(workload.count([make_batch(encoder, [0, 1], Task.T2I)])) == {Task.T2I: 2}


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_peak_is_only_claimed_where_the_sheet_is_of_that_gpu(name: str, model: str | None):
    assert peak_of(name) == (GPUS[model].peak if model else None)
