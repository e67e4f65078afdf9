"""What stored latents save (`data.prepare.latents`): the autoencoder's share of a step, at the published sizes.

OMP_NUM_THREADS=1 python -m benchmarks.latents              # FLOPs and bytes, counted without computing
OMP_NUM_THREADS=1 python -m benchmarks.latents --time 512   # and seconds of this machine for an image
python -m benchmarks.latents --time 1024 --device cuda
"""

import time
from dataclasses import replace
from statistics import median
from typing import Annotated

import torch
import typer
from diffusers.models import AutoencoderDC

from benchmarks.step_sizes import Cell, Size, make_batch, make_model, make_run, real
from benchmarks.step_variants import OURS, our_steps
from tests.models import published
from wemmu.backbones.vae import FrozenVAE
from wemmu.config.task import Task
from wemmu.measuring.fake_world import fake_world
from wemmu.types import Latents

BYTES, CPU = 2, torch.device("cpu")  # of a bfloat16


def flops(size: Size, cell: Cell, stored: bool) -> int:
    """Of a step; with stored latents of all images, where they have the grid that is asked for."""
    with fake_world() as mode:
        model = make_model(size, CPU, torch.float32)
        batch = make_batch(size, cell, model.vlm.token_px)
        if stored:
            side, images = cell.px // model.vae.latent_px, batch.images.shape[1]
            latents = torch.zeros(cell.samples, 1 + images, model.vae.latent_channels, side, side)
            batch = replace(batch, latents=Latents(latents[:, 0], latents[:, 1:]))
        (step,) = our_steps(model, make_run(cell, "single", "float32"), batch, {"ours": OURS["ours"]}, CPU).values()
        before = mode.flops
        step()
        return mode.flops - before


def seconds(px: int, device: torch.device, dtype: torch.dtype) -> list[float]:
    torch.manual_seed(0)
    with device, torch.no_grad():
        vae = FrozenVAE(AutoencoderDC(**published.DCAE).to(dtype).eval())
        image = torch.randint(0, 256, (1, 3, px, px), dtype=torch.uint8)
        found = []
        for _ in range(4):
            begun = time.perf_counter()
            vae.encode(image)
            if device.type == "cuda":
                torch.cuda.synchronize()
            found.append(time.perf_counter() - begun)
    return found[1:]


def main(
    time_: Annotated[int, typer.Option("--time", help="side of an image to encode, in px")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda, for --time")] = "cpu",
) -> None:
    size = real()
    if not time_:
        for cell in size.cells:
            ours, stored = (flops(size, cell, how) for how in (False, True))
            images, side = 1 + (cell.task == Task.EDIT), cell.px // 32
            kib = BYTES * published.DCAE["latent_channels"] * side**2 * images / 1024
            print(
                f"{cell.name}: {ours / cell.samples / 1e12:.2f} TFLOP for a sample, {(ours - stored) / ours:.1%} of it "
                f"the autoencoder's that storing saves ({ours / stored:.2f} times); {kib:.0f} KiB of latents",
                flush=True,
            )
        return
    taken = seconds(time_, torch.device(device), torch.bfloat16 if device == "cuda" else torch.float32)
    print(f"an image of {time_} px on {device}: {median(taken):.3g} s (least {min(taken):.3g})")


if __name__ == "__main__":
    typer.run(main)
