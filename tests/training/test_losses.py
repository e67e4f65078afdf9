"""The loss of a stage: its parts, its pairs, and what it does not depend on."""

from dataclasses import replace

import pytest
import torch

from tests.models.world import make_batch, micro_batches
from tests.training.runs import STAGE_RUN
from wemmu.config import StageRun
from wemmu.config.task import Task
from wemmu.prompts import PromptEncoder
from wemmu.recipes.wemmu.loss import FlowMatchingLoss
from wemmu.recipes.wemmu.model import WeMMU
from wemmu.types import Batch, Flow

IDS = [30, 10, 50, 20]


def of_kind(kind: str) -> StageRun:
    return STAGE_RUN.changed({"stage.objective.kind": kind, "stage.objective.weight": 0.3})


def permuted(batch: Batch, order: torch.Tensor) -> Batch:
    """The same samples with the same partners in another order."""
    prompts = batch.prompts
    return replace(
        batch,
        sample_ids=batch.sample_ids[order],
        prompts=replace(
            prompts,
            input_ids=prompts.input_ids[order],
            mask=prompts.mask[order],
            positions=prompts.positions[:, order],
            next_position=prompts.next_position[order],
        ),
        images=batch.images[order],
        target=batch.target[order],
        negatives=replace(batch.negatives, index=torch.argsort(order)[batch.negatives.index[order]]),
    )


@pytest.mark.parametrize("kind", ["flow", "contrastive"])
def test_permuting_the_batch_permutes_the_losses(model: WeMMU, encoder: PromptEncoder, kind: str):
    loss, batch = FlowMatchingLoss(model, of_kind(kind)), make_batch(encoder, IDS)
    with torch.no_grad():
        straight = loss(batch, 5).values
        assert len(set(straight.tolist())) == 4
        for order in ([3, 2, 1, 0], [1, 2, 3, 0], [2, 0, 3, 1]):
            there = torch.tensor(order)
            torch.testing.assert_close(loss(permuted(batch, there), 5).values, straight[there], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["flow", "contrastive"])
def test_each_samples_loss_has_the_weight_of_its_time(kind: str):
    run, generator = of_kind(kind), torch.Generator().manual_seed(0)
    weighted = run.changed({"stage.objective.weighting.kind": "sigma_sqrt"})
    x, v, negative, predicted = torch.randn(4, 3, 2, 2, 2, generator=generator)
    flow = Flow(x, torch.tensor([0.25, 0.5, 1.0]), v, negative, torch.tensor([True, False, True]))
    plain, other = (FlowMatchingLoss(None, each).values(predicted, flow) for each in (run, weighted))
    torch.testing.assert_close(other, plain * torch.tensor([16.0, 4.0, 1.0]))


@torch.no_grad()
@pytest.mark.parametrize("task", [Task.RECONSTRUCTION, Task.EDIT])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_self_reconstruction_hides_the_latents_of_its_share_of_reconstructions(
    model: WeMMU, encoder: PromptEncoder, task: Task, share: float
):
    loss = FlowMatchingLoss(model, STAGE_RUN.changed({"recipe.bridge.reconstruct_without_vae": share}))
    batch, branch = make_batch(encoder, IDS, task), model.bridge.vae_branch.linear

    def without(step: int) -> bool:
        states = loss.condition(batch, step).states
        branch.weight.mul_(2)
        other = loss.condition(batch, step).states
        branch.weight.div_(2)
        return torch.equal(states, other)

    hidden = sum(without(step) for step in range(12)) / 12
    if task is Task.EDIT or share in (0, 1):
        assert hidden == (share if task is Task.RECONSTRUCTION else 0)
    else:
        assert 0 < hidden < 1
    assert without(3) == without(3), "a function of the step"


@pytest.mark.parametrize(("world", "accumulation"), [(1, 2), (1, 4), (2, 1), (4, 1), (2, 2)])
def test_a_samples_loss_does_not_depend_on_the_layout(
    model: WeMMU, encoder: PromptEncoder, world: int, accumulation: int
):
    """Its partner is the next sample of the global batch, wherever that is."""
    loss = FlowMatchingLoss(model, of_kind("contrastive"))

    def values(world: int, accumulation: int) -> dict[int, float]:
        parts = [micro_batches(encoder, IDS, Task.T2I, rank, world, accumulation) for rank in range(world)]
        batches = [batch for rank in parts for batch in rank]
        return {i: v for b in batches for i, v in zip(b.sample_ids.tolist(), loss(b, 2).values.tolist(), strict=True)}

    with torch.no_grad():
        assert values(world, accumulation) == pytest.approx(values(1, 1), rel=1e-5)


def test_contrast_is_with_the_partners_own_path(model: WeMMU, encoder: PromptEncoder):
    flow = FlowMatchingLoss(model, of_kind("contrastive")).draw(make_batch(encoder, IDS), 0)
    assert torch.equal(flow.v_negative, flow.v.roll(-1, 0))
    assert flow.paired.all()
    alone = FlowMatchingLoss(model, of_kind("contrastive")).draw(make_batch(encoder, IDS[:1], following=IDS[1]), 0)
    torch.testing.assert_close(alone.v_negative, flow.v[1:2], rtol=1e-4, atol=1e-4)


def test_a_sample_that_comes_twice_in_a_row_is_not_its_own_partner(model: WeMMU, encoder: PromptEncoder):
    flow = FlowMatchingLoss(model, of_kind("contrastive")).draw(make_batch(encoder, [7, 7, 9], following=9), 0)
    assert flow.paired.tolist() == [False, True, False]


def test_another_partner_is_another_loss(model: WeMMU, encoder: PromptEncoder):
    loss = FlowMatchingLoss(model, of_kind("contrastive"))
    with torch.no_grad():
        one, other = (loss(make_batch(encoder, [7], following=f), 0).values for f in (8, 9))
    assert float(one) != float(other)
