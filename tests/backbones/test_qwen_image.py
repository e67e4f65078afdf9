"""Qwen-Image, an MM-DiT with another call signature, and its autoencoder are backbones: each needs its folder alone."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor

from tests.checkpoints import differing, load_weights
from tests.data.handmade import all_tasks, write
from tests.models.on_disk import make_backbones
from tests.models.world import random_images
from tests.parallel.cases import EDIT, T2I, Case, merged, single
from tests.parallel.test_zero3 import check, engine_of, nothing_stays, on, recomputing
from tests.planning.worlds import MINIATURE, curriculum_with
from tests.training.runs import make_run, train
from tools.convert_ckpt import main as convert
from wemmu.backbones.adapters import adapter_of
from wemmu.backbones.qwen_image.adapter import ADAPTER
from wemmu.backbones.vae import FrozenVAE
from wemmu.config import StageRun
from wemmu.config.schema import Backbones
from wemmu.config.task import Task
from wemmu.diagnosis import preflight
from wemmu.pipeline import WeMMUPipeline
from wemmu.published.check import problems
from wemmu.published.layout import BackboneError
from wemmu.recipes.wemmu.config import WeMMU
from wemmu.sampling.solvers import euler
from wemmu.training.build import build

CONFIG = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24}
CONFIG |= {"axes_dims_rope": (4, 6, 6)}
# 16 channels as published, 8 px to a latent.
VAE_CONFIG = {"base_dim": 8, "num_res_blocks": 1}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Backbones:
    root = tmp_path_factory.mktemp("backbones")
    made = make_backbones(root, layers=2)
    torch.manual_seed(2)
    QwenImageTransformer2DModel(**CONFIG).save_pretrained(root / "qwen" / "transformer")
    AutoencoderKLQwenImage(**VAE_CONFIG).save_pretrained(root / "qwen" / "vae")
    return made.model_copy(update={"dit": root / "qwen" / "transformer", "vae": root / "qwen" / "vae"})


@pytest.mark.parametrize("changes", [{}, {"zero_cond_t": True}], ids=["Qwen-Image", "Qwen-Image-Edit-2511"])
@torch.no_grad()
def test_our_solver_and_decoder_generate_what_the_pipeline_of_diffusers_does(changes: dict):
    """Packing, time, sign, order of rows and columns, statistics of latents: any of them wrong gives another image."""
    torch.manual_seed(3)
    dit, vae = QwenImageTransformer2DModel(**CONFIG, **changes).eval(), AutoencoderKLQwenImage(**VAE_CONFIG).eval()
    noise, states, times = torch.randn(2, 16, 4, 6), torch.randn(2, 5, 24), torch.tensor([1.0, 0.7, 0.2, 0.0])
    pipe = QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, dit)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompt_embeds=states, latents=pipe._pack_latents(noise, 2, 16, 4, 6), height=4 * 8, width=6 * 8,
        sigmas=times[:-1].tolist(), output_type="pt", true_cfg_scale=1.0,
    ).images  # fmt: skip

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return adapter_of(dit).velocity(dit, x, t, states)

    latents, decode = euler(velocity, noise, times), FrozenVAE(vae).decode
    torch.testing.assert_close((decode(latents) / 2 + 0.5).clamp(0, 1), theirs, atol=1e-5, rtol=1e-5)
    assert (decode(latents) - decode(noise)).abs().max() > 0.01


@torch.no_grad()
def test_latents_are_those_of_diffusers():
    torch.manual_seed(4)
    vae, pixels = FrozenVAE(AutoencoderKLQwenImage(**VAE_CONFIG)), random_images(5, 2, 3, 16, 24)
    pipe = QwenImageEditPipeline(FlowMatchEulerDiscreteScheduler(), vae.vae, None, None, None, None)
    theirs = pipe._encode_vae_image((pixels / 127.5 - 1)[:, :, None], None)
    torch.testing.assert_close(vae.encode(pixels), theirs[:, :, 0])
    vae.channels_last()
    torch.testing.assert_close(vae.encode(pixels), theirs[:, :, 0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_sizes_that_the_model_cannot_take_are_refused():
    dit = QwenImageTransformer2DModel(**CONFIG)
    t = torch.zeros(1)
    with pytest.raises(ValueError, match="packs 2 x 2 latents into a token and cannot take 3 x 4"):
        ADAPTER.velocity(dit, torch.zeros(1, 16, 3, 4), t, torch.zeros(1, 5, 24))
    with pytest.raises(ValueError, match="has 4096 positions, too few for 4095 tokens"):
        ADAPTER.velocity(dit, torch.zeros(1, 16, 8, 4), t, torch.zeros(1, 4095, 24))


@pytest.mark.parametrize(
    "make", [pytest.param(engine_of, marks=pytest.mark.slow), recomputing], ids=["kept", "recomputed"]
)
def test_zero3_trains_bridge_and_dit_as_the_single_engine_does(backbones: Backbones, make):
    case = Case(tasks=(T2I, EDIT))
    theirs = merged([single(case, backbones)])
    assert any(name.startswith("dit.") and g.abs().max() > 0 for name, g in theirs.gradients.items())
    check(on(2, backbones, {"stage": case}, make, nothing_stays)["stage"], theirs)


# ----------------------------------------------------------------------------------------------- a run and its export
@pytest.fixture(scope="module")
def run(backbones: Backbones, tmp_path_factory: pytest.TempPathFactory) -> StageRun:
    shards = tmp_path_factory.mktemp("shards")
    write(shards, all_tasks({Task.T2I: 8, Task.EDIT: 8}))
    return make_run(backbones, shards, sampling={"steps": 2, "prompts": [{"text": "a red circle"}]})


@pytest.fixture(scope="module")
def trained(run: StageRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "stage"
    train(run, folder)
    return folder


def test_a_stage_samples_and_resumes_bit_for_bit(run: StageRun, trained: Path, tmp_path: Path):
    assert list((trained / "samples").rglob("*.png"))
    folder = shutil.copytree(trained, tmp_path / "stage")
    last = folder / "checkpoints" / "step_00000008"
    expected, _ = load_weights(last)
    shutil.rmtree(last)
    assert train(run, folder) == last
    assert differing(load_weights(last)[0], expected) == []


def test_an_export_is_a_pipeline_with_this_transformer(trained: Path, tmp_path: Path):
    # Compares tensors and images with the training model, and fails if they differ.
    convert(trained, out=tmp_path / "export")
    assert json.loads((tmp_path / "export" / "parity.json").read_text())["outputs"]["compared"]
    pipe = WeMMUPipeline.from_pretrained(tmp_path / "export")
    assert isinstance(pipe.transformer, QwenImageTransformer2DModel)


# ---------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"guidance_embeds": True}, "has guidance_embeds"),
        ({"use_layer3d_rope": True}, "has use_layer3d_rope"),
        ({"in_channels": 256}, "takes 256 channels in a token and returns 64"),
        ({"in_channels": 128, "out_channels": 32}, "takes 32 channels, the autoencoder .* makes 16"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_what_does_not_fit_is_refused_by_the_config_alone(backbones: Backbones, tmp_path: Path, changes, told: str):
    dit = shutil.copytree(backbones.dit, tmp_path / "qwen")
    config = json.loads((dit / "config.json").read_text())
    (dit / "config.json").write_text(json.dumps(config | changes))
    (found,) = problems(backbones.model_copy(update={"dit": dit}), WeMMU.backbones)
    assert str(dit) in found
    assert re.search(told, found)


def test_the_hybrid_engine_is_refused_before_anything_is_loaded(run: StageRun):
    hybrid = run.changed({"parallel.engine": "hybrid"})
    told = f"engine hybrid cannot divide the QwenImageTransformer2DModel {run.backbones.dit}; valid: .*single, zero3"
    with pytest.raises(BackboneError, match=told):
        build(hybrid)
    assert preflight.backbones(curriculum_with(MINIATURE, run.backbones)).status == "ok"
    finding = preflight.degrees(curriculum_with(MINIATURE, run.backbones, "parallel.engine=hybrid"))
    assert finding.status == "problem"
    assert re.search(told, finding.found)
    with pytest.raises(ValueError, match="valid: tp 1 and pp 1 on engine single or zero3"):
        ADAPTER.stage(QwenImageTransformer2DModel(**CONFIG), 0, 1)
