"""SanaTransformer2DModel on the shapes world: text to image, with Sana's own text encoder in miniature.

The text encoder (Gemma 2) is trained along with the DiT and kept in the Sana directory, so that a stock
`SanaPipeline` loads it; the bridge later takes its place. Labels of the cells, predicted from the encoder's states by
a linear head that is thrown away, teach it early which words belong together. Later phases dwell on captions that
leave the places open: there the cells have to agree on one layout, which is decided at the noisiest times, and a head
on the transformer's own tokens asks each of them for the whole of it.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
from tokenizers import Tokenizer, processors
from torch import Tensor, nn
from transformers import AutoTokenizer, Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from tools.pretraining.loop import fit
from wemmu.config.stage import TimeSampling
from wemmu.models.dit import TIME_SCALE
from wemmu.models.vae import FrozenVAE
from wemmu.objectives.flow import flow_matching
from wemmu.objectives.path import sample_path, sample_time
from wemmu.pixels import to_images
from wemmu.sampling.solvers import euler, times
from wemmu.shapes.backbones import DIT_CONFIG, HIGH_PX, LOW_PX, TEXT_ENCODER_CONFIG
from wemmu.shapes.language import caption, wordings
from wemmu.shapes.render import render
from wemmu.shapes.scene import BACKGROUNDS, CELLS, COLORS, SHAPES, SIZES, Scene, Split, random_scene
from wemmu.shapes.scorer import caption_satisfied

SHIFT = 4.0
DROP_CAPTION = 0.1
AUX_WEIGHT = 0.3
# The fourth block, so that others are left to act on what the cells agreed on.
LAYOUT_BLOCK = 3


@dataclass(frozen=True)
class Phase:
    """What a phase of training is about."""

    steps: int
    lr: float
    # Every how many steps a batch is at LOW_PX; 0: never.
    low_every: int = 2
    # How often scenes have one, two, three objects; None: as `random_scene` has it.
    objects: tuple[int, int, int] | None = None
    # Share of captions that leave places open, and of those how many of two objects side by side tell their relation.
    open: float = 0.0
    related: float = 0.75
    # Time shifts, taken in turn by the samples of a batch.
    shifts: tuple[float, ...] = (SHIFT,)
    # Whether the transformer's tokens are asked for the layout.
    layout: bool = False


PHASES = {
    "dit": Phase(4500, 1.5e-3),
    "dit-layouts": Phase(2500, 8e-4, open=0.5, shifts=(2 * SHIFT,)),
    # Relations are told of two objects only.
    "dit-open": Phase(4000, 1.2e-3, objects=(1, 4, 2), open=0.75, shifts=(2 * SHIFT,)),
    # At 32 px one 3 x 3 convolution sees all four cells; at 64 px they have to be taught to agree (docs/log.md).
    "dit-relations": Phase(
        2000, 1e-3, low_every=0, objects=(0, 1, 0), open=1.0, related=1.0, shifts=(4 * SHIFT,), layout=True
    ),
    "dit-mixed": Phase(2500, 1.2e-3, low_every=4, objects=(1, 3, 2), open=0.55, shifts=(4 * SHIFT, SHIFT), layout=True),
}


class TextEncoder(nn.Module):
    """Words -> condition states. The mask is not needed: the padding is a token like any other, always at the end."""

    LENGTH = 40

    def __init__(self, tokenizer: PreTrainedTokenizerFast, gemma: Gemma2Model):
        super().__init__()
        self.tokenizer, self.gemma = tokenizer, gemma

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """States [B, L, caption channels] and the mask [B, L] of real tokens."""
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


def _caption(scene: Scene, rng: random.Random, phase: Phase) -> str:
    """A caption, which leaves the places of objects open as often as the phase wants it."""
    if rng.random() >= phase.open:
        return caption(scene, rng)
    told = "related" if "related" in wordings(scene) and rng.random() < phase.related else "unplaced"
    return caption(scene, rng, told)


class Painter:
    """The DiT with its text encoder and autoencoder: one loss, one sampler."""

    def __init__(self, dit: SanaTransformer2DModel, text: TextEncoder, vae: FrozenVAE):
        self.dit, self.text, self.vae = dit, text, vae
        per_cell = 1 + len(SHAPES) * len(COLORS) * len(SIZES)
        self._split = [per_cell] * len(CELLS) + [len(BACKGROUNDS)]
        # Read off the last word's state, where a causal encoder has seen all of the caption.
        self.auxiliary = nn.Linear(TEXT_ENCODER_CONFIG["hidden_size"], sum(self._split))
        width = dit.config.num_attention_heads * dit.config.attention_head_dim
        self.layout = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(self._split)))
        self._tokens: Tensor | None = None
        dit.transformer_blocks[LAYOUT_BLOCK].register_forward_hook(self._keep)

    def _keep(self, _block: nn.Module, _inputs: tuple[Tensor, ...], tokens: Tensor) -> None:
        self._tokens = tokens

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All that is trained."""
        return {"dit": self.dit, "text": self.text.gemma, "auxiliary": self.auxiliary, "layout": self.layout}

    def velocity(self, x_t: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        return self.dit(
            x_t, encoder_hidden_states=states, encoder_attention_mask=mask, timestep=t * TIME_SCALE, return_dict=False
        )[0]

    def loss(self, name: str, step: int, batch_size: int) -> tuple[Tensor, dict[str, float]]:
        """Of one batch of a phase, drawn from the step's number."""
        phase, rng = PHASES[name], random.Random(f"{name}-{step}")
        generator = torch.Generator().manual_seed(len(PHASES) * step + list(PHASES).index(name))
        px = LOW_PX if phase.low_every and step % phase.low_every == phase.low_every - 1 else HIGH_PX
        objects = [rng.choices((1, 2, 3), phase.objects)[0] if phase.objects else None for _ in range(batch_size)]
        scenes = [random_scene(rng, objects=count) for count in objects]
        texts = ["" if rng.random() < DROP_CAPTION else _caption(s, rng, phase) for s in scenes]
        pictures = torch.stack([torch.from_numpy(np.array(render(s, px))) for s in scenes]).permute(0, 3, 1, 2)
        x_0 = self.vae.encode(pictures)
        states, mask = self.text(texts)
        eps = torch.randn(x_0.shape, generator=generator)
        t = self._times(phase, px, batch_size, generator)
        path = sample_path(x_0, eps, t)
        flow = flow_matching(self.velocity(path.x_t, t, states, mask), path.v).mean()
        # Only captions that say everything have one right answer, but the others do no harm: a soft target.
        told = torch.tensor([bool(text) for text in texts])
        slots = torch.tensor([_slots(s) for s in scenes])
        last = states[torch.arange(batch_size), mask.sum(1) - 1][told]
        aux = self._missed(self.auxiliary(last), slots[told])
        loss = flow + AUX_WEIGHT * aux
        parts = {"flow": flow.item(), "aux": aux.item()}
        if phase.layout:
            assert self._tokens is not None
            count = self._tokens.shape[1]
            layout = self._missed(self.layout(self._tokens).flatten(0, 1), slots.repeat_interleave(count, 0))
            loss, parts["layout"] = loss + AUX_WEIGHT * layout, layout.item()
        return loss, parts

    def _times(self, phase: Phase, px: int, count: int, generator: torch.Generator) -> Tensor:
        """Times [count], the phase's shifts in turn."""
        z = torch.randn(count, generator=generator)
        t = torch.empty(count)
        for i, shift in enumerate(phase.shifts):
            sampling = TimeSampling(shift=shift, reference_resolution=HIGH_PX, resolution_exponent=0.0)
            t[i :: len(phase.shifts)] = sample_time(sampling, px, z[i :: len(phase.shifts)])
        return t

    def _missed(self, logits: Tensor, slots: Tensor) -> Tensor:
        """Cross-entropy of logits [N, all classes] against slots [N, cells + 1], the mean over slots."""
        parts = zip(logits.split(self._split, dim=-1), slots.unbind(1), strict=True)
        return torch.stack([F.cross_entropy(a, b) for a, b in parts]).mean()

    @torch.no_grad()
    def exact(self, split: Split, px: int, guidance: float = 2.0, count: int = 128, steps: int = 16) -> float:
        """Share of pictures that satisfy their caption."""
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
    """The VLM's vocabulary, with a first token before every text as Gemma's has, so that no text is empty."""
    backend = Tokenizer.from_str(words.backend_tokenizer.to_str())
    first = "<|im_start|>"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, words.convert_tokens_to_ids(first))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=first, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )


def train(vlm_dir: Path, vae: AutoencoderDC, out: Path, work: Path, effort: float = 1.0, batch_size: int = 64) -> None:
    """Train and write the whole Sana directory, in the published layout, to `out`.

    `effort` scales every phase's steps.
    """
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
        scores = {
            f"{split} {px}": painter.exact(split, px) for split in ("test", "composition") for px in (LOW_PX, HIGH_PX)
        }
        dit.train(), gemma.train()
        return scores

    for name, phase in PHASES.items():
        fit(
            name,
            painter.modules,
            lambda step, name=name: painter.loss(name, step, batch_size),
            steps=max(1, round(effort * phase.steps)),
            lr=phase.lr,
            work=work,
            evaluate=evaluate,
        )
    # The stock pipeline writes the published layout, model_index.json included.
    SanaPipeline(tokenizer, gemma, vae, dit, FlowMatchEulerDiscreteScheduler(shift=SHIFT)).save_pretrained(out)


def load(sana: Path, vae: FrozenVAE) -> Painter:
    """A trained Sana directory, ready to be measured."""
    text = TextEncoder(
        AutoTokenizer.from_pretrained(sana / "tokenizer"), Gemma2Model.from_pretrained(sana / "text_encoder")
    )
    return Painter(SanaTransformer2DModel.from_pretrained(sana / "transformer").eval(), text.eval(), vae)
