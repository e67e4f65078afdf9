"""Qwen2.5-VL on the shapes world: describe, answer, and say what an edit would make of an image.

The frozen VLM bounds what the bridge can follow, so it is taught the hard part first: the full description of the scene
AFTER an instruction (text-only, on one image, on two). Labels that linear heads predict, thrown away afterwards,
break the plateaus: what a cell holds, on the vision tower's tokens; and which object is meant, on the last word of each
mention ("the red circle"). The second phase has two more layers, and its labels of mentions are read half-way up, so
that the layers above have something to do with them.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tools.pretraining.labels import CHOICES, CLASSES, attributes, cells
from tools.pretraining.loop import fit
from wemmu.backbones.patches import patchify
from wemmu.pixels import to_pixels
from wemmu.prompts import PromptEncoder
from wemmu.shapes.backbones import HIGH_PX, LOW_PX, MERGE, PATCH_PX, TOKEN_PX, vlm_config
from wemmu.shapes.edits import random_edit, random_two_image_edit
from wemmu.shapes.language import SIZE_WORDS, caption, full_caption, parse_caption, question, references
from wemmu.shapes.processor import save_processor, special_ids
from wemmu.shapes.render import render
from wemmu.shapes.scene import CELLS, Object, Scene, Split, random_scene

# Share of each kind of example.
KINDS = {"caption": 2, "edit": 6, "two_image": 4, "second": 0.5, "question": 2, "text_question": 1.5, "text": 4}
AUX_WEIGHT = 0.5


@dataclass(frozen=True)
class Example:
    scenes: tuple[Scene, ...]
    prompt: str
    answer: str
    # The scene that the prompt speaks of: the first image, or the one that the text describes.
    about: Scene | None = None

    def mentions(self) -> list[tuple[Object, int]]:
        """Return the objects that the prompt names, each with the character index where its name ends."""
        if self.about is None:
            return []
        named = [(f"what is at the {CELLS[o.cell]}", o) for o in self.about.objects]
        for o in self.about.objects:
            for place in (f"at the {CELLS[o.cell]}", f"in the {CELLS[o.cell]} corner"):
                named += [(f"{text} {place}", o) for text in _phrases(o)]
        found = {self.prompt.index(text) + len(text): o for text, o in named if text in self.prompt}
        # Of several references that stand there, as "the circle" in "the circle at the top left", the longest is meant.
        referred = [(r, o) for o in self.about.objects for r in references(self.about, o) if r in self.prompt]
        if referred:
            text, obj = max(referred, key=lambda pair: len(pair[0]))
            found[self.prompt.index(text) + len(text)] = obj
        return [(obj, end) for end, obj in found.items()]


def _phrases(obj: Object) -> list[str]:
    """What a caption may call an object that it gives a place."""
    return [f"a {size}{obj.color} {obj.shape}" for size in (*(f"{word} " for word in SIZE_WORDS[obj.size]), "")]


def example(kind: str, rng: random.Random, split: Split = "train") -> Example:
    match kind:
        case "caption":
            scene = random_scene(rng, split)
            return Example((scene,), rng.choice(("", "describe the image")), full_caption(scene))
        case "edit":
            edit = random_edit(rng, split)
            return Example(edit.sources, edit.instruction, full_caption(edit.target), about=edit.sources[0])
        case "two_image":
            edit = random_two_image_edit(rng, split)
            return Example(edit.sources, edit.instruction, full_caption(edit.target), about=edit.sources[0])
        case "second":
            edit = random_two_image_edit(rng, split)
            return Example(edit.sources, "describe the second image", full_caption(edit.sources[1]))
        case "question":
            scene = random_scene(rng, split)
            return Example((scene,), *question(scene, rng), about=scene)
        case "text_question":
            scene = random_scene(rng, split)
            ask, answer = question(scene, rng)
            return Example((), f"{full_caption(scene)}. {ask}", answer, about=scene)
        case "text":
            # Half of the captions leave something open; the answer then is one scene that satisfies them.
            scene = random_scene(rng, split)
            return Example((), rng.choice((caption(scene, rng), full_caption(scene))), full_caption(scene), about=scene)
        case _:
            raise AssertionError(kind)


def _grids(e: Example, px: int) -> list[tuple[int, int]]:
    return [(px // TOKEN_PX, px // TOKEN_PX)] * len(e.scenes)


def _cell_labels(scenes: list[Scene], tokens_per_side: int) -> dict[str, Tensor]:
    """What each vision token's cell holds: [images, tokens] of shape, colour, size (0: empty cell), background."""
    cell = cells(tokens_per_side)
    return {name: of.expand(-1, len(CELLS))[:, cell] for name, of in attributes(scenes).items()}


def _object_labels(objects: list[Object]) -> dict[str, Tensor]:
    """Each [objects]: shape, colour, size and cell."""
    named = {n: torch.tensor([of.index(getattr(o, n)) - 1 for o in objects]) for n, of in CHOICES.items()}
    return named | {"cell": torch.tensor([o.cell for o in objects])}


# Without that of an empty cell.
OBJECT_CLASSES = {**{name: len(choices) - 1 for name, choices in CHOICES.items()}, "cell": len(CELLS)}


class Labels(nn.Module):
    """Linear heads that classify tokens; used in pre-training only."""

    def __init__(self, width: int, classes: dict[str, int]):
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, n) for name, n in classes.items()})

    def forward(self, tokens: Tensor, labels: dict[str, Tensor]) -> Tensor:
        losses = [F.cross_entropy(self.heads[k](tokens), v.flatten()) for k, v in labels.items()]
        return torch.stack(losses).mean()


class Teacher:
    """Turns examples into batches for one VLM and runs it."""

    def __init__(self, vlm: Qwen2_5_VLForConditionalGeneration, encoder: PromptEncoder):
        self.vlm, self.encoder = vlm, encoder

    def images(self, examples: list[Example], px: int) -> dict[str, Tensor]:
        """Return all images, in order, as inputs of the VLM."""
        images = [render(scene, px) for e in examples for scene in e.scenes]
        if not images:
            return {}
        grid = torch.tensor([[1, px // PATCH_PX, px // PATCH_PX]]).expand(len(images), -1)
        return {"pixel_values": patchify(to_pixels(images), PATCH_PX, MERGE, 2), "image_grid_thw": grid}

    def loss(self, examples: list[Example], px: int) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """Return the mean cross-entropy over the answers' tokens; the vision tokens [images * tokens, width] of all
        images; each layer's input and the output, [rows, tokens, width].
        """
        grids = [_grids(e, px) for e in examples]
        prompts, labels = self.encoder.answered([e.prompt for e in examples], [e.answer for e in examples], grids)
        embeds, vision = self.vlm.get_input_embeddings()(prompts.input_ids), None
        if images := self.images(examples, px):
            vision = self.vlm.model.visual(images["pixel_values"], images["image_grid_thw"])
            at = (prompts.input_ids == self.encoder.image_token_id)[..., None].expand_as(embeds)
            embeds = embeds.masked_scatter(at, vision)
        out = self.vlm.model.language_model(
            inputs_embeds=embeds,
            attention_mask=prompts.mask.long(),
            position_ids=prompts.positions,
            use_cache=False,
            output_hidden_states=True,
        )
        # Only answers are taught.
        taught = labels >= 0
        loss = F.cross_entropy(self.vlm.lm_head(out.last_hidden_state[taught]), labels[taught])
        return loss, vision, out.hidden_states

    def mentions(self, examples: list[Example], px: int) -> tuple[list[int], list[int], list[Object]]:
        """Return rows whose prompt names an object, the index of the token that ends its name, and the object."""
        found: list[tuple[int, int, Object]] = []
        for row, e in enumerate(examples):
            grids = _grids(e, px)
            whole = self.encoder.token_ids(e.prompt, grids)
            for obj, end in e.mentions():
                # No prompt of the world holds "#", so the two rows part right behind the name.
                cut = self.encoder.token_ids(e.prompt[:end] + "#", grids)
                after = next(i for i, (a, b) in enumerate(zip(whole, cut, strict=False)) if a != b)
                found.append((row, after - 1, obj))
        return [row for row, _, _ in found], [token for _, token, _ in found], [obj for _, _, obj in found]

    def answer(self, examples: list[Example], px: int, limit: int = 40) -> list[str]:
        """Generate answers greedily."""
        tokenizer = self.encoder.tokenizer
        rows = [self.encoder.token_ids(e.prompt, _grids(e, px)) for e in examples]
        asked = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
        stop = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": self.encoder.pad_token_id}
        vlm: Any = self.vlm
        said = vlm.generate(**asked, **self.images(examples, px), **stop, max_new_tokens=limit, do_sample=False)
        return tokenizer.batch_decode(said[:, asked.input_ids.shape[1] :], skip_special_tokens=True)


def right(kind: str, e: Example, answer: str) -> bool:
    """Return whether an answer is exact; any scene that satisfies an incomplete caption answers it."""
    if kind != "text":
        return answer == e.answer
    try:
        said = parse_caption(answer)
        # None where the answer leaves something open, which `Object` and `Scene` refuse.
        mentions: Any = said.mentions
        background: Any = said.background
        objects = tuple(Object(m.cell, m.shape, m.color, m.size) for m in mentions)
        return parse_caption(e.prompt).satisfied_by(Scene(background, objects))
    except (ValueError, TypeError):
        return False


def evaluate(teacher: Teacher, split: Split, px: int, count: int = 96) -> dict[str, float]:
    """Share of exact answers for each kind."""
    scores = {}
    for kind in ("caption", "edit", "two_image", "question", "text_question", "text"):
        rng = random.Random(f"vlm-eval-{split}-{kind}")
        examples = [example(kind, rng, split) for _ in range(count)]
        answers = teacher.answer(examples, px)
        scores[f"{kind} {split} {px}"] = sum(right(kind, e, a) for a, e in zip(answers, examples, strict=True)) / count
    return scores


def deepened(vlm: Qwen2_5_VLForConditionalGeneration) -> Qwen2_5_VLForConditionalGeneration:
    """Insert a layer after the second and after the third that does not change the function yet."""
    config = Qwen2_5_VLConfig.from_dict(vlm.config.to_dict())
    order = (0, 1, 1, 2, 2, 3)
    config.text_config.num_hidden_layers = len(order)
    config.text_config.layer_types = ["full_attention"] * len(order)
    deep = Qwen2_5_VLForConditionalGeneration(config)
    layers = vlm.model.language_model.layers
    deep.model.visual.load_state_dict(vlm.model.visual.state_dict())
    deep.model.language_model.embed_tokens.load_state_dict(vlm.model.language_model.embed_tokens.state_dict())
    deep.model.language_model.norm.load_state_dict(vlm.model.language_model.norm.state_dict())
    for place, source in enumerate(order):
        layer = deep.model.language_model.layers[place]
        layer.load_state_dict(layers[source].state_dict())
        if place in (2, 4):
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
    return deep


def train(
    out: Path, work: Path, steps: int, deep_steps: int, batch_size: int = 40
) -> Qwen2_5_VLForConditionalGeneration:
    processor: Any = save_processor(out)
    torch.manual_seed(0)
    shallow = vlm_config(len(processor.tokenizer), special_ids(processor))
    shallow["text_config"]["num_hidden_layers"] = 4
    vlm = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**shallow))
    encoder, width = PromptEncoder(out), shallow["text_config"]["hidden_size"]
    seen, meant = Labels(width, CLASSES), Labels(width, OBJECT_CLASSES)

    def loss_fn(teacher: Teacher, step: int, phase: str, layer: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"{phase}-{step}")
        px = HIGH_PX if step % 3 == 0 else LOW_PX
        chosen = rng.choices(tuple(KINDS), tuple(KINDS.values()), k=batch_size)
        examples = [example(kind, rng) for kind in chosen]
        loss, vision, states = teacher.loss(examples, px)
        cells = seen(vision, _cell_labels([s for e in examples for s in e.scenes], px // TOKEN_PX))
        rows, tokens, objects = teacher.mentions(examples, px)
        mentions = meant(states[layer][rows, tokens], _object_labels(objects))
        parts = {"loss": loss, "cells": cells, "mentions": mentions}
        return loss + AUX_WEIGHT * (cells + mentions), {k: v.item() for k, v in parts.items()}

    def phase(name: str, vlm: Qwen2_5_VLForConditionalGeneration, steps: int, lr: float, layer: int) -> None:
        teacher = Teacher(vlm, encoder)
        print(f"{name}: {sum(p.numel() for p in vlm.parameters()) / 1e6:.2f} M parameters", flush=True)
        fit(
            name,
            {"vlm": vlm, "seen": seen, "meant": meant},
            lambda step: loss_fn(teacher, step, name, layer),
            steps=steps,
            lr=lr,
            work=work,
            warmup=200,
            evaluate=lambda: evaluate(teacher, "test", LOW_PX) | evaluate(teacher, "test", HIGH_PX),
            evaluate_every=2000,
        )

    phase("vlm", vlm, steps, 2e-3, layer=-1)
    vlm = deepened(vlm)
    phase("vlm-deep", vlm, deep_steps, 1.5e-3, layer=3)
    return vlm
