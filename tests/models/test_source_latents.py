"""A DiT that takes the latents of the image to edit behind those of the noisy image."""

from pathlib import Path

import pytest
import torch
from diffusers import SanaTransformer2DModel

from tests.models.world import make_batch, make_model
from tests.training.runs import STAGE_RUN
from wemmu.backbones.full_precision import Widened
from wemmu.backbones.qwen_image.adapter import ADAPTER
from wemmu.config import StageRun
from wemmu.config.schema import Backbones, Sampling
from wemmu.config.task import Task
from wemmu.prompts import PromptEncoder
from wemmu.published.layout import BackboneError
from wemmu.recipes.wemmu.build import build_model, sources
from wemmu.recipes.wemmu.config import Bridge, WeMMU
from wemmu.recipes.wemmu.loss import FlowMatchingLoss
from wemmu.sampling.request import GenerationRequest
from wemmu.sampling.sampler import Sampler
from wemmu.types import Condition

BRIDGE = Bridge(position_table=8, source_latents=True)


@pytest.fixture
def wide(backbones: Backbones):
    return build_model(backbones, BRIDGE, seed=3)[0]


def awake(model) -> None:
    """The source's weights as after some training."""
    with torch.no_grad():
        weight = model.dit.patch_embed.proj.weight
        weight[:, model.vae.latent_channels :] = torch.randn(weight[:, model.vae.latent_channels :].shape) * 0.1


@torch.no_grad()
@pytest.mark.parametrize("task", [Task.T2I, Task.EDIT])
def test_before_training_the_source_changes_no_bit(backbones: Backbones, wide, encoder: PromptEncoder, task: Task):
    batch, narrow = make_batch(encoder, [0, 1], task), make_model(backbones)
    ours, theirs = (FlowMatchingLoss(model, STAGE_RUN)(batch, 3).values for model in (wide, narrow))
    assert torch.equal(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize(
    ("task", "matters"), [(Task.EDIT, True), (Task.MULTI_EDIT, True), (Task.RECONSTRUCTION, False)]
)
def test_edits_alone_give_the_dit_their_first_image(wide, encoder: PromptEncoder, task: Task, matters: bool):
    awake(wide)
    loss, batch = FlowMatchingLoss(wide, STAGE_RUN), make_batch(encoder, [0, 1], task, (48, 32))
    condition = loss.condition(batch, 0)
    if not matters:
        assert condition.source is None
        return
    assert torch.equal(condition.source, wide.vae.encode(batch.images[:, 0], (3, 2)))
    flow = loss.draw(batch, 0)
    given, without = (wide.velocity(flow.x_t, flow.t, c) for c in (condition, Condition(condition.states)))
    assert not torch.equal(given, without)


def test_the_sources_weights_learn_from_edits_and_not_from_text(wide, encoder: PromptEncoder):
    loss, channels = FlowMatchingLoss(wide, STAGE_RUN), wide.vae.latent_channels
    wide.ready_to_train(("vae_branch", "pathway", "position_mlp", "dit"), False)
    for task, learns in ((Task.T2I, False), (Task.EDIT, True)):
        wide.zero_grad()
        loss(make_batch(encoder, [0, 1], task), 0).values.sum().backward()
        assert bool(wide.dit.patch_embed.proj.weight.grad[:, channels:].any()) == learns


@torch.no_grad()
def test_guidance_gives_the_source_to_the_branches_that_see_the_image(wide, encoder: PromptEncoder, monkeypatch):
    awake(wide)
    batch, seen = make_batch(encoder, [0, 1], Task.EDIT), []

    def velocity(x, t, condition):
        seen.append(condition.source)
        return torch.zeros_like(x)

    monkeypatch.setattr(wide, "velocity", velocity)
    request = GenerationRequest(Task.EDIT, ["a", "b"], batch.images, (32, 32), batch.sample_ids)
    Sampler(wide, encoder, 3.0)(request, Sampling(steps=1, image=2.0, instruction=3.0))
    unconditional, image, full = seen[0].unflatten(0, (3, 2))
    assert not unconditional.any()
    assert torch.equal(image, full)
    assert torch.equal(full, wide.vae.encode(batch.images[:, 0], (2, 2)))


def test_masters_begin_with_the_file_and_zeros(backbones: Backbones, wide):
    source = sources(backbones, BRIDGE, 3, wide)["dit.patch_embed.proj.weight"]
    assert isinstance(source, Widened)
    assert torch.equal(source.read((slice(0, 4),)), wide.dit.patch_embed.proj.weight[:4])


def test_an_export_says_how_many_channels_it_takes(wide, tmp_path: Path):
    awake(wide)
    wide.dit.save_pretrained(tmp_path)
    again = SanaTransformer2DModel.from_pretrained(tmp_path)
    x, t, y = torch.randn(1, 64, 2, 2), torch.tensor([300.0]), torch.randn(1, 4, wide.caption_channels)
    ours, theirs = (
        dit(x, encoder_hidden_states=y, timestep=t, return_dict=False)[0] for dit in (wide.dit, again.eval())
    )
    assert ours.shape == (1, 32, 2, 2)
    assert torch.equal(ours, theirs)


def test_hybrid_is_refused() -> None:
    def with_engine(engine: str) -> StageRun:
        parallel = {"engine": engine, "ranks": 2, "tp": 2} if engine == "hybrid" else {"engine": engine}
        return StageRun.model_validate(
            STAGE_RUN.model_dump() | {"recipe": WeMMU(bridge=BRIDGE).model_dump(), "parallel": parallel}
        )

    with_engine("single")
    with pytest.raises(ValueError, match="source_latents does not run on engine hybrid; valid: single, zero3"):
        with_engine("hybrid")


def test_a_family_that_cannot_is_refused(backbones: Backbones) -> None:
    with pytest.raises(BackboneError, match=r"Qwen-Image takes no source latents .* valid with it: Sana"):
        ADAPTER.widen(None)
