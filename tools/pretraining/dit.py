"""SanaTransformer2DModel on the shapes world: text to image, with Sana's own text encoder in miniature.

The text encoder (Gemma 2) is trained along with the DiT and kept in the Sana directory, so that a stock
`SanaPipeline` loads it; the bridge later takes its place. Labels of the cells, predicted from the encoder's states by
a linear head that is thrown away, teach it early which words belong together. A second phase dwells on captions that
leave the places open: there the cells have to agree on one layout, which is decided at the noisiest times.
"""

import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models import AutoencoderDC, SanaTransformer2DModel
from diffusers.pipelines.sana.pipeline_sana import SanaPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, processors
from torch import Tensor, nn
from transformers import AutoTokenizer, Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from tools.pretraining.loop import fit, held_out
from wemmu.backbones.sana.adapter import TIME_SCALE
from wemmu.backbones.vae import FrozenVAE
from wemmu.config.objectives import TimeSampling
from wemmu.objectives.flow import square_error
from wemmu.objectives.path import sample_path, sample_time
from wemmu.pixels import to_images
from wemmu.sampling.solvers import euler, times
from wemmu.shapes.backbones import DIT_CONFIG, HIGH_PX, LOW_PX, TEXT_ENCODER_CONFIG
from wemmu.shapes.language import caption, parse_caption
from wemmu.shapes.render import render
from wemmu.shapes.scene import BACKGROUNDS, CELLS, COLORS, SHAPES, SIZES, Scene, Split, random_scene
from wemmu.shapes.scorer import caption_satisfied

SHIFT = 4.0
DROP_CAPTION = 0.1
AUX_WEIGHT = 0.3
TIME = TimeSampling(shift=SHIFT, reference_resolution=HIGH_PX, resolution_exponent=0.0)
LAYOUT_TIME = TIME.model_copy(update={"shift": 2 * SHIFT})


class TextEncoder(nn.Module):
    """Texts -> condition states. No mask is needed: padding is an ordinary token, always at the end."""

    LENGTH = 40

    def __init__(self, tokenizer: PreTrainedTokenizerFast, gemma: Gemma2Model):
        super().__init__()
        self.tokenizer, self.gemma = tokenizer, gemma

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Return states [B, L, caption channels] and the mask [B, L] of real tokens."""
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt", max_length=self.LENGTH, truncation=True)
        states = self.gemma(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return states, tokens.attention_mask


def _slots(scene: Scene) -> list[int]:
    """What each cell holds as one class (0 = nothing), then the background."""
    classes = [0] * len(CELLS)
    for o in scene.objects:
        at = (SHAPES.index(o.shape) * len(COLORS) + tuple(COLORS).index(o.color)) * len(SIZES) + SIZES.index(o.size)
        classes[o.cell] = 1 + at
    return [*classes, tuple(BACKGROUNDS).index(scene.background)]


def _caption(scene: Scene, rng: random.Random, layouts: bool) -> str:
    """A caption; with `layouts` every second one leaves the place of some object open."""
    text = caption(scene, rng)
    if layouts and rng.random() < 0.5:
        while all(mention.cell is not None for mention in parse_caption(text).mentions):
            text = caption(scene, rng)
    return text


class Painter:
    """The DiT with its text encoder and autoencoder: one loss, one sampler."""

    def __init__(self, dit: SanaTransformer2DModel, text: TextEncoder, vae: FrozenVAE):
        self.dit, self.text, self.vae = dit, text, vae
        width = TEXT_ENCODER_CONFIG["hidden_size"]
        per_cell = 1 + len(SHAPES) * len(COLORS) * len(SIZES)
        # Read off the last word's state, where a causal encoder has seen all of the caption.
        self.auxiliary = nn.Linear(width, len(CELLS) * per_cell + len(BACKGROUNDS))
        self._split = [per_cell] * len(CELLS) + [len(BACKGROUNDS)]

    def velocity(self, x_t: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        return self.dit(
            x_t, encoder_hidden_states=states, encoder_attention_mask=mask, timestep=t * TIME_SCALE, return_dict=False
        )[0]

    def loss(self, phase: str, batch_size: int, step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"{phase}-{step}")
        layouts = phase == "dit-layouts"
        generator = torch.Generator().manual_seed(2 * step + 1 if layouts else step)
        px = LOW_PX if step % 2 else HIGH_PX
        scenes = [random_scene(rng) for _ in range(batch_size)]
        texts = ["" if rng.random() < DROP_CAPTION else _caption(s, rng, layouts) for s in scenes]
        drawn = torch.stack([torch.from_numpy(np.array(render(s, px))) for s in scenes]).permute(0, 3, 1, 2)
        x_0 = self.vae.encode(drawn)
        states, mask = self.text(texts)
        eps = torch.randn(x_0.shape, generator=generator)
        t = sample_time(LAYOUT_TIME if layouts else TIME, px, torch.randn(batch_size, generator=generator))
        path = sample_path(x_0, eps, t)
        flow = square_error(self.velocity(path.x_t, t, states, mask), path.v).mean()
        # Only captions that say everything have one right answer, but the others do no harm: a soft target.
        with_text = torch.tensor([bool(text) for text in texts])
        last = states[torch.arange(batch_size), mask.sum(1) - 1][with_text]
        logits = self.auxiliary(last).split(self._split, dim=-1)
        slots = torch.tensor([_slots(s) for s in scenes])[with_text]
        aux = torch.stack([F.cross_entropy(a, b) for a, b in zip(logits, slots.unbind(1), strict=True)]).mean()
        return flow + AUX_WEIGHT * aux, {"flow": flow.item(), "aux": aux.item()}

    @torch.no_grad()
    def exact(self, split: Split, px: int, guidance: float = 2.0, count: int = 128, steps: int = 16) -> float:
        """Share of images that satisfy their caption."""
        rng = random.Random(f"dit-eval-{split}")
        captions = [caption(random_scene(rng, split), rng) for _ in range(count)]
        states, mask = self.text(captions + [""] * count)
        side = px // self.vae.latent_px
        x = torch.randn(count, self.vae.latent_channels, side, side, generator=torch.Generator().manual_seed(0))

        def guided(x: Tensor, t: Tensor) -> Tensor:
            full, empty = self.velocity(torch.cat([x, x]), torch.cat([t, t]), states, mask).chunk(2)
            return empty + guidance * (full - empty)

        images = to_images(self.vae.decode(euler(guided, x, times(steps, SHIFT))))
        return sum(map(caption_satisfied, images, captions)) / count


def sana_tokenizer(words: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the VLM's vocabulary and, like Gemma's, a first token before every text."""
    backend = Tokenizer.from_str(words.backend_tokenizer.to_str())
    first = "<|im_start|>"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, words.convert_tokens_to_ids(first))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=first, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )


def train(
    vlm_dir: Path, vae: AutoencoderDC, out: Path, work: Path, steps: int, layout_steps: int, batch_size: int = 64
) -> None:
    """Train and write the whole Sana directory, in the published layout, to `out`."""
    torch.manual_seed(0)
    tokenizer = sana_tokenizer(AutoTokenizer.from_pretrained(vlm_dir))
    dit = SanaTransformer2DModel(**DIT_CONFIG)
    gemma = Gemma2Model(
        Gemma2Config(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **TEXT_ENCODER_CONFIG)
    )
    print(f"dit: {sum(p.numel() for p in dit.parameters()) / 1e6:.2f} M parameters", flush=True)
    painter = Painter(dit, TextEncoder(tokenizer, gemma), FrozenVAE(vae))

    def evaluate() -> dict[str, float]:
        dit.eval(), gemma.eval()
        scores = held_out(painter.exact)
        dit.train(), gemma.train()
        return scores

    modules = {"dit": dit, "text": gemma, "auxiliary": painter.auxiliary}
    for phase, count, lr in (("dit", steps, 1.5e-3), ("dit-layouts", layout_steps, 8e-4)):
        fit(
            phase,
            modules,
            partial(painter.loss, phase, batch_size),
            steps=count,
            lr=lr,
            work=work,
            evaluate=evaluate,
        )
    # The stock pipeline writes the published layout, model_index.json included.
    words: Any = tokenizer
    SanaPipeline(words, gemma, vae, dit, FlowMatchEulerDiscreteScheduler(shift=SHIFT)).save_pretrained(out)


def load(sana: Path, vae: FrozenVAE) -> Painter:
    """Load a trained Sana directory for measurements."""
    text = TextEncoder(
        AutoTokenizer.from_pretrained(sana / "tokenizer"), Gemma2Model.from_pretrained(sana / "text_encoder")
    )
    return Painter(SanaTransformer2DModel.from_pretrained(sana / "transformer").eval(), text.eval(), vae)
