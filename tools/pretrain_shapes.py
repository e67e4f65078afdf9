"""Pre-train the tiny backbones of the shapes world and write them in the published layout.

    python tools/pretrain_shapes.py vae                 # AutoencoderDC
    python tools/pretrain_shapes.py vae-mixed           # its decoder, for images of mixed sizes
    python tools/pretrain_shapes.py shift DIR           # by how many px an autoencoder moves images of several sizes
    python tools/pretrain_shapes.py vlm                 # Qwen2.5-VL, tokenizer and processor
    python tools/pretrain_shapes.py dit                 # Sana, on the autoencoder's latents; needs the two others
    python tools/pretrain_shapes.py encoders            # CLIP and DINOv2, for rewards and metrics; needs the vlm
    python tools/pretrain_shapes.py separation          # what these two tell apart -> encoders/separation.json
    python tools/pretrain_shapes.py scores              # measure all three on held-out scenes -> scores.json

Seeded and resumable: run the same command again after any interruption. The two first do not need each other and can
run side by side, one thread each. What the shipped ones reached is in `assets/shapes/scores.json`.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import typer
from diffusers.models import AutoencoderDC
from transformers import Qwen2_5_VLForConditionalGeneration

app = typer.Typer(help=__doc__, no_args_is_help=True)

Out = Annotated[Path, typer.Option(help="where the backbones go")]
Work = Annotated[Path, typer.Option(help="state of unfinished training")]
Threads = Annotated[int, typer.Option(help="CPU threads")]
ASSETS = Path("assets/shapes")
WORK = Path("runs/pretrain")


def _start(work: Path, threads: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)


@app.command()
def vae(steps: int = 3200, out: Out = ASSETS, work: Work = WORK, threads: Threads = 1) -> None:
    """Train the autoencoder (about 25 CPU-minutes)."""
    from tools.pretraining.vae import train

    _start(work, threads)
    train(work, steps).save_pretrained(out / "sana" / "vae")


@app.command()
def vae_mixed(steps: int = 1000, out: Out = ASSETS, work: Work = WORK, threads: Threads = 1) -> None:
    """Train the autoencoder's decoder on mixed sizes (about 4 CPU-minutes); needs the vae."""
    from tools.pretraining.vae import train

    _start(work, threads)
    train(work, steps, start=out / "sana" / "vae").half().save_pretrained(out / "vae-mixed")


@app.command()
def shift(vae: Path) -> None:
    """Print by how many px the autoencoder in the folder VAE moves held-out images of several sizes."""
    from tools.pretraining.vae import MIXED_SIZES
    from tools.pretraining.vae import shift as measure

    model = AutoencoderDC.from_pretrained(vae, torch_dtype=torch.float32).eval()
    for size in (*MIXED_SIZES, (64, 80), (64, 128)):
        print(
            "{}x{}".format(*size), f"{measure(model, size):.2f} px, moved by 2 px {measure(model, size, 2, 2):.2f} px"
        )


@app.command()
def vlm(steps: int = 3600, deep_steps: int = 2600, out: Out = ASSETS, work: Work = WORK, threads: Threads = 1) -> None:
    """Train the VLM (about 60 CPU-minutes)."""
    from tools.pretraining.vlm import train

    _start(work, threads)
    train(out / "vlm", work, steps, deep_steps).save_pretrained(out / "vlm")


@app.command()
def dit(
    steps: int = 4500, layout_steps: int = 2500, out: Out = ASSETS, work: Work = WORK, threads: Threads = 1
) -> None:
    """Train the diffusion transformer and its text encoder (about 60 CPU-minutes)."""
    from tools.pretraining.dit import train

    _start(work, threads)
    train(out / "vlm", AutoencoderDC.from_pretrained(out / "sana" / "vae"), out / "sana", work, steps, layout_steps)


@app.command()
def encoders(
    clip_steps: int = 1400, dino_steps: int = 1000, out: Out = ASSETS, work: Work = WORK, threads: Threads = 1
) -> None:
    """Train the two image encoders (about 10 CPU-minutes)."""
    from tools.pretraining.encoders import processor, train_clip, train_dino

    _start(work, threads)
    model, tokenizer = train_clip(out / "vlm", work, clip_steps)
    tokenizer.save_pretrained(out / "encoders" / "clip")
    for name, trained in (("clip", model), ("dino", train_dino(work, dino_steps))):
        trained.half().save_pretrained(out / "encoders" / name)
        processor().save_pretrained(out / "encoders" / name)


@app.command()
def separation(out: Out = ASSETS, count: int = 300, threads: Threads = 1) -> None:
    """Measure what the encoders tell apart on held-out scenes, with three seeds; writes encoders/separation.json."""
    from tools.pretraining.encoders import separation as measure
    from wemmu.backbones.encoders import load_encoder

    torch.set_num_threads(threads)
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name in ("clip", "dino"):
        encoder = load_encoder(out / "encoders" / name)
        seeds = [measure(encoder, seed, count) for seed in range(3)]
        found[name] = {
            change: {key: [round(one[change][key], 3) for one in seeds] for key in seeds[0][change]}
            for change in seeds[0]
        }
    _write(out / "encoders" / "separation.json", {"scenes": count, "seeds": 3, **found})


@app.command()
def scores(out: Out = ASSETS, count: int = 200, threads: Threads = 1) -> None:
    """Measure the backbones on held-out scenes and held-out colour-shape pairs; writes scores.json."""
    from tools.pretraining import dit, vae, vlm
    from tools.pretraining.loop import HELD_OUT, held_out
    from wemmu.backbones.vae import FrozenVAE
    from wemmu.prompts import PromptEncoder
    from wemmu.shapes.backbones import HIGH_PX, LOW_PX

    torch.set_num_threads(threads)
    autoencoder = AutoencoderDC.from_pretrained(out / "sana" / "vae").eval()
    teacher = vlm.Teacher(
        Qwen2_5_VLForConditionalGeneration.from_pretrained(out / "vlm").eval(), PromptEncoder(out / "vlm")
    )
    painter = dit.load(out / "sana", FrozenVAE(autoencoder))
    answers = [vlm.evaluate(teacher, split, px, count) for split in HELD_OUT for px in (LOW_PX, HIGH_PX)]
    measured = {
        "vae round trip": held_out(lambda split, px: vae.round_trip(autoencoder, split, px, count)),
        "vlm exact answer": {kind: share for one in answers for kind, share in one.items()},
        "dit text to image": held_out(lambda split, px: painter.exact(split, px, count=count)),
    }
    rounded = {part: {name: round(value, 4) for name, value in of.items()} for part, of in measured.items()}
    _write(out / "scores.json", {"scenes": count, **rounded})


def _write(file: Path, values: dict[str, Any]) -> None:
    from wemmu.config.files import replace_text

    text = json.dumps(values, indent=1) + "\n"
    replace_text(file, text)
    print(text)


if __name__ == "__main__":
    app()
