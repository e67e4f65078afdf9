"""One number, the resolution, moves everything that depends on it; the batch and the schedule it leaves alone."""

from pathlib import Path

import pytest
import torch

from tests.training.rising import curriculum_of, write_shards
from wemmu.config.schema import Backbones
from wemmu.data.loader import Loader
from wemmu.prompts import PromptEncoder
from wemmu.recipes.wemmu.loss import FlowMatchingLoss
from wemmu.recipes.wemmu.model import WeMMU


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    write_shards(root)
    return root


@pytest.mark.parametrize(("number", "px", "micro"), [(0, 32, 2), (1, 64, 1)])
def test_buckets_grids_crop_shift_and_micro_batch_follow(
    model: WeMMU, encoder: PromptEncoder, backbones: Backbones, shards: Path, number: int, px: int, micro: int
):
    run = curriculum_of(backbones, shards).resolution_runs("stage")[number]
    batches = Loader(run, encoder, model.vlm.token_px).micro_batches(0)
    assert {tuple(batch.target.shape) for batch in batches} == {(micro, 3, px, px)}
    assert micro * len(batches) == run.stage.global_batch == 4

    loss = FlowMatchingLoss(model, run)
    flow, condition = loss.draw(batches[0], 0), loss.condition(batches[0], 0)
    latents, tokens = px // model.vae.latent_px, px // model.vlm.token_px
    assert flow.x_t.shape[-2:] == (latents, latents)
    assert condition.states.shape[1] == tokens**2

    [gradient] = torch.autograd.grad(condition.states.square().sum(), [model.bridge.position_mlp.table])
    used = gradient.abs().sum(-1) > 0  # [side, side]
    margin = (len(used) - tokens) // 2
    expected = torch.zeros_like(used)
    expected[margin : margin + tokens, margin : margin + tokens] = True
    assert torch.equal(used, expected)

    assert run.stage.objective.time.shift_at(px) == pytest.approx(3.0 * px / 1024)
    assert run.stage.optimizer.lr_share(7, run.stage.steps) == run.stage.optimizer.lr_share(7, 10)
