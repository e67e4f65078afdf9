"""The miniature's image encoders, in the real classes: a CLIP and a DINOv2, with different objectives.

CLIP learns from captions: in-batch contrast, where every scene comes with three others that differ from it in one
thing. Contrast alone ignores places, as in published CLIPs, so its image feature also learns the attributes of every
cell. The DINO-like encoder never sees a word: its CLS token and its patches learn these attributes alone. So one can
reward and the other can tell whether a gain is more than the reward's own taste.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorFast, CLIPModel, Dinov2Config, Dinov2Model
from transformers.image_utils import PILImageResampling

from tools.pretraining.labels import CHOICES, CLASSES, attributes, cells
from tools.pretraining.loop import fit
from wemmu.backbones.encoders import ImageEncoder, cosine
from wemmu.pixels import to_pixels
from wemmu.shapes.backbones import ENCODER_PATCH_PX, ENCODER_WIDTH, HIGH_PX, LOW_PX
from wemmu.shapes.edits import swap
from wemmu.shapes.language import caption, full_caption
from wemmu.shapes.render import render
from wemmu.shapes.scene import BACKGROUNDS, COLORS, SHAPES, SIZES, Scene, random_scene

MEAN = STD = [0.5, 0.5, 0.5]
RESOLUTIONS = (LOW_PX, 48, HIGH_PX, 96)
GROUP = 4
_TEXT_WIDTH = 64
_VISION = {
    "hidden_size": ENCODER_WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": HIGH_PX,
    "patch_size": ENCODER_PATCH_PX,
}


# ------------------------------------------------------------------------------------------------------ changes
def _attribute(name: str, choices: tuple[str, ...]) -> Callable[[Scene, random.Random], Scene | None]:
    def change(scene: Scene, rng: random.Random) -> Scene | None:
        old = rng.choice(scene.objects)
        new = rng.choice([choice for choice in choices if choice != getattr(old, name)])
        changed: dict[str, Any] = {name: new}
        return swap(scene, old, replace(old, **changed))

    return change


def _move(scene: Scene, rng: random.Random) -> Scene | None:
    old = rng.choice(scene.objects)
    return swap(scene, old, replace(old, cell=rng.choice(scene.free_cells)))


def _relation(scene: Scene, rng: random.Random) -> Scene | None:
    """Two objects change places, which reverses every relation between them."""
    if len(scene.objects) < 2:
        return None
    a, b = rng.sample(scene.objects, 2)
    rest = tuple(o for o in scene.objects if o not in (a, b))
    return replace(scene, objects=(*rest, replace(a, cell=b.cell), replace(b, cell=a.cell)))


def _background(scene: Scene, rng: random.Random) -> Scene | None:
    return replace(scene, background=rng.choice([name for name in BACKGROUNDS if name != scene.background]))


# What differs -> a scene that differs in it alone; None where it cannot.
CHANGES: dict[str, Callable[[Scene, random.Random], Scene | None]] = {
    "colour": _attribute("color", tuple(COLORS)),
    "shape": _attribute("shape", SHAPES),
    "size": _attribute("size", SIZES),
    "position": _move,
    "relation": _relation,
    "background": _background,
}


def _changed(scene: Scene, rng: random.Random) -> Scene:
    while True:
        found = CHANGES[rng.choice(tuple(CHANGES))](scene, rng)
        if found is not None and found != scene and found.split == "train":
            return found


# ------------------------------------------------------------------------------------------------------- images
def drawn(scenes: list[Scene], rng: random.Random) -> Tensor:
    """Draw scenes as imperfect generated images show them, [B, 3, px, px] in [0, 1]: other resolution, noise, blur."""
    px = rng.choice(RESOLUTIONS)
    x = (to_pixels([render(scene, px) for scene in scenes]) + 1) / 2
    x = nn.functional.interpolate(x, (HIGH_PX, HIGH_PX), mode="bicubic", antialias=True)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(rng.getrandbits(62)))
    return (x + rng.choice((0.0, 0.02, 0.05)) * noise).clamp(0, 1)


def _normalised(x: Tensor) -> Tensor:
    return (x - 0.5) / 0.5


def processor() -> CLIPImageProcessorFast:
    return CLIPImageProcessorFast(
        size={"shortest_edge": HIGH_PX},
        crop_size={"height": HIGH_PX, "width": HIGH_PX},
        resample=PILImageResampling.BICUBIC,
        image_mean=MEAN,
        image_std=STD,
    )


# --------------------------------------------------------------------------------------------------------- CLIP
def train_clip(tokenizer_from: Path, work: Path, steps: int, groups: int = 12) -> tuple[CLIPModel, Any]:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
    eos = tokenizer.eos_token_id
    # As CLIP's own tokenizer does, at whose end its text feature is read.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, eos)]
    )
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": _TEXT_WIDTH,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "eos_token_id": eos,
        "bos_token_id": tokenizer.pad_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = _VISION | {"intermediate_size": 3 * ENCODER_WIDTH}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=_TEXT_WIDTH))
    # Of the size of the patches' embeddings; from CLIP's 0.02 it takes thousands of steps until places matter.
    nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.3)
    heads, patch_heads = _Heads(_TEXT_WIDTH), _Heads(ENCODER_WIDTH)

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"clip-{step}")
        scenes: list[Scene] = []
        for _ in range(groups):
            base = random_scene(rng, "train")
            scenes += dict.fromkeys([base, *(_changed(base, rng) for _ in range(GROUP - 1))])
        # Captions that name every place; captions that say less would also be true of the changed scene.
        texts = [full_caption(s) if rng.random() < 0.7 else caption(s, rng, "placed") for s in scenes]
        out = model(**tokenizer(texts, padding=True, return_tensors="pt"), pixel_values=_normalised(drawn(scenes, rng)))
        labels = torch.arange(len(scenes))
        logits = out.logits_per_image
        loss = (nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits.t(), labels)) / 2
        with torch.no_grad():
            # CLIP's own limit.
            model.logit_scale.clamp_(max=4.6)
        truth = attributes(scenes)
        # Normalised features have entries of about 1 / sqrt(width).
        of_cells, known = heads.of_image(_TEXT_WIDTH**0.5 * out.image_embeds, truth)
        of_cells = of_cells + patch_heads.of_patches(out.vision_model_output.last_hidden_state[:, 1:], truth)
        right = (logits.argmax(1) == labels).float().mean().item()
        return loss + 0.3 * of_cells, {"loss": loss.item(), "right": right, "attributes": known}

    fit("clip", {"clip": model, "heads": heads, "patches": patch_heads}, loss_fn, steps=steps, lr=1e-3, work=work)
    return model.eval(), tokenizer


# --------------------------------------------------------------------------------------------------------- DINO
class _Heads(nn.Module):
    """Linear heads for training: of an image's feature for all cells, of a patch for its own cell."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = {name: CLASSES[name] for name in CHOICES}
        self.image = nn.ModuleDict({name: nn.Linear(width, 4 * n) for name, n in sizes.items()})
        self.image["background"] = nn.Linear(width, len(BACKGROUNDS))
        self.patch = nn.ModuleDict({name: nn.Linear(width, n) for name, n in sizes.items()})

    def of_image(self, features: Tensor, truth: dict[str, Tensor]) -> tuple[Tensor, float]:
        """Return the summed cross-entropy and the share of correct attributes for features [B, D]."""
        losses, right = [], []
        for name, head in self.image.items():
            logits = head(features).unflatten(1, (truth[name].shape[1], -1)).transpose(1, 2)
            losses.append(nn.functional.cross_entropy(logits, truth[name]))
            right.append((logits.argmax(1) == truth[name]).float().mean())
        return torch.stack(losses).sum(), torch.stack(right).mean().item()

    def of_patches(self, features: Tensor, truth: dict[str, Tensor]) -> Tensor:
        """Return the summed cross-entropy of each patch's own cell for features [B, patches, D]."""
        cell = cells(HIGH_PX // ENCODER_PATCH_PX)
        losses = [
            nn.functional.cross_entropy(head(features).transpose(1, 2), truth[name][:, cell])
            for name, head in self.patch.items()
        ]
        return torch.stack(losses).sum()


def train_dino(work: Path, steps: int, batch_size: int = 64) -> Dinov2Model:
    torch.manual_seed(1)
    model, heads = Dinov2Model(Dinov2Config(**_VISION, mlp_ratio=3, layerscale_value=0.1)), _Heads(ENCODER_WIDTH)

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"dino-{step}")
        scenes = [random_scene(rng, "train") for _ in range(batch_size)]
        states = model(_normalised(drawn(scenes, rng))).last_hidden_state
        truth = attributes(scenes)
        loss, right = heads.of_image(states[:, 0], truth)
        loss = loss + heads.of_patches(states[:, 1:], truth)
        return loss, {"loss": loss.item(), "right": right}

    fit("dino", {"dino": model, "heads": heads}, loss_fn, steps=steps, lr=1e-3, work=work)
    return model.eval()


# --------------------------------------------------------------------------------------------------- separation
@torch.no_grad()
def separation(encoder: ImageEncoder, seed: int, count: int) -> dict[str, dict[str, float]]:
    """Compare a scene with the same scene rendered again, and with a scene that differs in one property.

    Returns change -> mean cosine, and the share of scenes whose redrawing is nearer than the changed scene.
    """
    rng = random.Random(f"separation/{seed}/test")
    found: dict[str, dict[str, float]] = {}
    scenes = [random_scene(rng, "test") for _ in range(count)]
    first, again = _embedded(encoder, scenes, 1), _embedded(encoder, scenes, 2)
    same = cosine(first, again)
    found["same scene, drawn again"] = {"cosine": same.mean().item()}
    for name, change in CHANGES.items():
        pairs = [(i, changed) for i, scene in enumerate(scenes) if (changed := change(scene, rng)) not in (None, scene)]
        rows = torch.tensor([i for i, _ in pairs])
        values = cosine(first[rows], _embedded(encoder, [s for _, s in pairs if s], 2))
        found[name] = {"cosine": values.mean().item(), "nearer": (same[rows] > values).float().mean().item()}
    # Small scenes repeat: the one before may be the same.
    rows = torch.tensor([i for i in range(count) if scenes[i] != scenes[i - 1]])
    other = cosine(first[rows], again[rows - 1])
    found["another scene"] = {"cosine": other.mean().item(), "nearer": (same[rows] > other).float().mean().item()}
    return found


def _embedded(encoder: ImageEncoder, scenes: list[Scene], draw: int) -> Tensor:
    rng = random.Random(f"drawn/{draw}")
    return torch.cat([encoder.embed(drawn(scenes[i : i + 8], rng)) for i in range(0, len(scenes), 8)])
