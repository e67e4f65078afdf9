"""Qwen2.5-VL on the shapes world: describe, answer, and say what an edit would make of a picture.

The frozen VLM bounds what the bridge can follow, so it is taught the hard part first: the full description of the scene
AFTER an instruction (text-only, on one picture, on two). Labels of the cells on the vision tower's tokens, predicted by
a linear head that is thrown away, break the plateau on which shapes are not yet told apart.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tools.pretraining.loop import fit
from wemmu.models.patches import patchify
from wemmu.pixels import to_pixels
from wemmu.prompts import PromptEncoder
from wemmu.shapes.backbones import HIGH_PX, LOW_PX, MERGE, PATCH_PX, TOKEN_PX, vlm_config
from wemmu.shapes.edits import random_edit, random_two_image_edit
from wemmu.shapes.language import caption, full_caption, question
from wemmu.shapes.processor import save_processor, special_ids
from wemmu.shapes.render import render
from wemmu.shapes.scene import BACKGROUNDS, CELLS, COLORS, SHAPES, SIZES, Scene, Split, random_scene

# Share of each kind of example: first mostly seeing and describing, then mostly editing.
KINDS = {"caption": 3, "edit": 6, "two_image": 4, "second": 1, "question": 2, "text_question": 1, "text": 2}
EDIT_KINDS = {"caption": 1, "edit": 11, "two_image": 5, "second": 0.5, "question": 1.5, "text_question": 0.5, "text": 1}
AUX_WEIGHT = 0.5


@dataclass(frozen=True)
class Example:
    scenes: tuple[Scene, ...]
    prompt: str
    answer: str


def example(kind: str, rng: random.Random, split: Split = "train") -> Example:
    match kind:
        case "caption":
            scene = random_scene(rng, split)
            return Example((scene,), rng.choice(("", "describe the image")), full_caption(scene))
        case "edit":
            edit = random_edit(rng, split)
            return Example(edit.sources, edit.instruction, full_caption(edit.target))
        case "two_image":
            edit = random_two_image_edit(rng, split)
            return Example(edit.sources, edit.instruction, full_caption(edit.target))
        case "second":
            edit = random_two_image_edit(rng, split)
            return Example(edit.sources, "describe the second image", full_caption(edit.sources[1]))
        case "question":
            scene = random_scene(rng, split)
            return Example((scene,), *question(scene, rng))
        case "text_question":
            scene = random_scene(rng, split)
            ask, answer = question(scene, rng)
            return Example((), f"{full_caption(scene)}. {ask}", answer)
        case "text":
            # Half of the captions leave something open; the answer then is one scene that satisfies them.
            scene = random_scene(rng, split)
            return Example((), rng.choice((caption(scene, rng), full_caption(scene))), full_caption(scene))
        case _:
            raise AssertionError(kind)


def _pictures(examples: list[Example], px: int) -> list[Image.Image]:
    return [render(scene, px) for e in examples for scene in e.scenes]


def _cell_labels(scenes: list[Scene], tokens_per_side: int) -> dict[str, Tensor]:
    """What each vision token's cell holds: [images, tokens] of shape, colour, size (0: empty cell), background."""
    per_cell = torch.tensor(
        [
            [
                (1 + SHAPES.index(o.shape), 1 + tuple(COLORS).index(o.color), 1 + SIZES.index(o.size), bg)
                if (o := s.at(cell))
                else (0, 0, 0, bg)
                for cell in range(len(CELLS))
            ]
            for s in scenes
            for bg in (tuple(BACKGROUNDS).index(s.background),)
        ]
    )
    side = torch.arange(tokens_per_side) * 2 // tokens_per_side
    token_cell = (2 * side[:, None] + side[None, :]).flatten()
    labels = per_cell[:, token_cell]
    return dict(zip(("shape", "color", "size", "background"), labels.unbind(-1), strict=True))


class Auxiliary(nn.Module):
    """Linear labels on vision tokens; used in pre-training only."""

    def __init__(self, width: int):
        super().__init__()
        classes = {"shape": len(SHAPES) + 1, "color": len(COLORS) + 1, "size": 3, "background": len(BACKGROUNDS)}
        self.heads = nn.ModuleDict({name: nn.Linear(width, n) for name, n in classes.items()})

    def forward(self, tokens: Tensor, labels: dict[str, Tensor]) -> Tensor:
        losses = [F.cross_entropy(self.heads[k](tokens), v.flatten()) for k, v in labels.items()]
        return torch.stack(losses).mean()


class Teacher:
    """Turns examples into batches for one VLM and runs it."""

    def __init__(self, vlm: Qwen2_5_VLForConditionalGeneration, encoder: PromptEncoder):
        self.vlm, self.encoder = vlm, encoder
        self.end = encoder.tokenizer.eos_token_id

    def vision(self, examples: list[Example], px: int) -> Tensor | None:
        """Vision tokens [images * tokens, width] of all pictures, in order."""
        pictures = _pictures(examples, px)
        if not pictures:
            return None
        patches = patchify(to_pixels(pictures), PATCH_PX, MERGE, 2)
        grid = torch.tensor([[1, px // PATCH_PX, px // PATCH_PX]]).expand(len(pictures), -1)
        return self.vlm.model.visual(patches, grid)

    def embed(self, rows: list[list[int]], examples: list[Example], px: int, vision: Tensor | None):
        """Embeddings, mask and positions of token rows whose image tokens carry `vision`."""
        side = px // TOKEN_PX
        prompts = self.encoder.pad(rows, [[(side, side)] * len(e.scenes) for e in examples])
        embeds = self.vlm.get_input_embeddings()(prompts.input_ids)
        if vision is not None:
            at = (prompts.input_ids == self.encoder.image_token_id)[..., None].expand_as(embeds)
            embeds = embeds.masked_scatter(at, vision)
        return prompts, embeds

    def loss(self, examples: list[Example], px: int) -> tuple[Tensor, Tensor | None]:
        """Mean cross-entropy over the answers' tokens, and the vision tokens."""
        side = px // TOKEN_PX
        tokenize = self.encoder.tokenizer
        asks = [self.encoder.token_ids(e.prompt, [(side, side)] * len(e.scenes)) for e in examples]
        answers = [[*tokenize(e.answer, add_special_tokens=False)["input_ids"], self.end] for e in examples]
        vision = self.vision(examples, px)
        prompts, embeds = self.embed([a + b for a, b in zip(asks, answers, strict=True)], examples, px, vision)
        hidden = self.vlm.model.language_model(
            inputs_embeds=embeds, attention_mask=prompts.mask.long(), position_ids=prompts.positions, use_cache=False
        ).last_hidden_state
        # The state at a token predicts the next one; only answers are taught.
        index = torch.arange(prompts.input_ids.shape[1])
        start = torch.tensor([len(a) for a in asks])[:, None]
        stop = start + torch.tensor([len(b) for b in answers])[:, None]
        taught = (index >= start - 1) & (index < stop - 1)
        labels = prompts.input_ids.roll(-1, dims=1)[taught]
        return F.cross_entropy(self.vlm.lm_head(hidden[taught]), labels), vision

    @torch.no_grad()
    def answer(self, examples: list[Example], px: int, limit: int = 40) -> list[str]:
        """Greedy answers, by recomputing the whole batch for each token (short answers; no cache to trust)."""
        side = px // TOKEN_PX
        rows = [self.encoder.token_ids(e.prompt, [(side, side)] * len(e.scenes)) for e in examples]
        asked = [len(r) for r in rows]
        vision = self.vision(examples, px)
        for _ in range(limit):
            prompts, embeds = self.embed(rows, examples, px, vision)
            hidden = self.vlm.model.language_model(
                inputs_embeds=embeds,
                attention_mask=prompts.mask.long(),
                position_ids=prompts.positions,
                use_cache=False,
            ).last_hidden_state
            last = torch.tensor([len(r) - 1 for r in rows])
            token = self.vlm.lm_head(hidden[torch.arange(len(rows)), last]).argmax(-1).tolist()
            rows = [r if r[-1] == self.end else [*r, t] for r, t in zip(rows, token, strict=True)]
            if all(r[-1] == self.end for r in rows):
                break
        return [
            self.encoder.tokenizer.decode(r[n:]).removesuffix("<|im_end|>") for r, n in zip(rows, asked, strict=True)
        ]


def evaluate(teacher: Teacher, split: Split, px: int, count: int = 96) -> dict[str, float]:
    """Share of exact answers for each kind whose answer is determined."""
    scores = {}
    for kind in ("caption", "edit", "two_image", "question", "text_question"):
        rng = random.Random(f"vlm-eval-{split}-{kind}")
        examples = [example(kind, rng, split) for _ in range(count)]
        answers = teacher.answer(examples, px)
        scores[f"{kind} {split} {px}"] = sum(a == e.answer for a, e in zip(answers, examples, strict=True)) / count
    return scores


def train(
    out: Path, work: Path, steps: int, edit_steps: int, batch_size: int = 40
) -> Qwen2_5_VLForConditionalGeneration:
    processor = save_processor(out)
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(**vlm_config(len(processor.tokenizer), special_ids(processor)))
    vlm = Qwen2_5_VLForConditionalGeneration(config)
    print(f"vlm: {sum(p.numel() for p in vlm.parameters()) / 1e6:.2f} M parameters", flush=True)
    teacher, auxiliary = Teacher(vlm, PromptEncoder(out)), Auxiliary(config.text_config.hidden_size)

    def loss_fn(step: int, phase: str, kinds: dict[str, float]) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"{phase}-{step}")
        px = HIGH_PX if step % 3 == 0 else LOW_PX
        chosen = rng.choices(tuple(kinds), tuple(kinds.values()), k=batch_size)
        examples = [example(kind, rng) for kind in chosen]
        loss, vision = teacher.loss(examples, px)
        labels = _cell_labels([s for e in examples for s in e.scenes], px // TOKEN_PX)
        aux = auxiliary(vision, labels)
        return loss + AUX_WEIGHT * aux, {"loss": loss.item(), "aux": aux.item()}

    def scores() -> dict[str, float]:
        return evaluate(teacher, "test", LOW_PX) | evaluate(teacher, "test", HIGH_PX)

    modules = {"vlm": vlm, "auxiliary": auxiliary}
    for phase, kinds, count, lr in (("vlm", KINDS, steps, 2e-3), ("vlm-edits", EDIT_KINDS, edit_steps, 1.2e-3)):
        fit(
            phase,
            modules,
            lambda step, phase=phase, kinds=kinds: loss_fn(step, phase, kinds),
            steps=count,
            lr=lr,
            work=work,
            warmup=200,
            evaluate=scores,
            evaluate_every=2000,
        )
    return vlm
