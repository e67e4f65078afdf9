"""The KL autoencoder of Stable Diffusion and FLUX: its latents are those of the pipelines, shifted and scaled."""

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor

from tests.data.handmade import all_tasks, write
from tests.models.on_disk import make_backbones
from tests.models.world import random_images
from tests.training.runs import make_run, train
from tools.convert_ckpt import main as convert
from wemmu.backbones.vae import FrozenVAE
from wemmu.backbones.weights import load_autoencoder
from wemmu.config.task import Task
from wemmu.published.layout import BackboneError

LEVELS = {
    "block_out_channels": (8, 8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
# The numbers of the published configs.
FLUX = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False}
SD = {"latent_channels": 4, "scaling_factor": 0.18215}


@torch.no_grad()
@pytest.mark.parametrize("config", [FLUX, SD], ids=["FLUX", "Stable Diffusion"])
def test_latents_are_those_of_the_pipelines(config: dict):
    torch.manual_seed(0)
    kl = AutoencoderKL(**LEVELS, **config).eval()
    vae, pixels = FrozenVAE(kl), random_images(5, 2, 3, 16, 24)
    images = VaeImageProcessor(vae_scale_factor=8).preprocess(pixels / 255)
    theirs = (kl.encode(images).latent_dist.mode() - config.get("shift_factor", 0)) * config["scaling_factor"]
    ours = vae.encode(pixels)
    assert ours.shape == (2, config["latent_channels"], 2, 3)
    assert (vae.latent_channels, vae.latent_px) == (config["latent_channels"], 8)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        vae.decode(ours), kl.decode(ours / config["scaling_factor"] + config.get("shift_factor", 0)).sample
    )


def test_a_folder_is_loaded_whole_or_refused(tmp_path):
    torch.manual_seed(0)
    AutoencoderKL(**LEVELS, **FLUX).save_pretrained(tmp_path / "vae")
    vae, report = load_autoencoder(tmp_path / "vae", torch.float32)
    assert (vae.scaling_factor, vae.latent_channels) == (0.3611, 16)
    assert not report.missing
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"diffusion_pytorch_model\.safetensors"):
        load_autoencoder(tmp_path / "vae", torch.float32)


def test_an_export_of_a_stage_with_it_generates_what_the_training_model_does(tmp_path):
    made = make_backbones(tmp_path, layers=2, dit={"in_channels": 16, "out_channels": 16})
    torch.manual_seed(0)
    AutoencoderKL(**LEVELS, **FLUX).save_pretrained(tmp_path / "vae")
    write(tmp_path / "shards", all_tasks({Task.T2I: 8, Task.EDIT: 8}))
    run = make_run(made.model_copy(update={"vae": tmp_path / "vae"}), tmp_path / "shards", sampling={"steps": 2})
    # Compares tensors and images, and fails if they differ.
    convert(train(run, tmp_path / "stage"), out=tmp_path / "export")
    assert (tmp_path / "export" / "parity.json").is_file()
