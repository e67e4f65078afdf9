"""Shared parts of the recipes that tune the VLM itself: a model with its head, its questions and answers."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, DynamicCache

from wemmu.backbones.full_precision import Sources, stored_vlm
from wemmu.backbones.versions import with_cache
from wemmu.backbones.vlm import VLM, causal_mask
from wemmu.backbones.weights import load_vlm
from wemmu.config.exported import PARITY
from wemmu.objectives.reconstruction import answer_cross_entropy
from wemmu.parallel.topology import Topology, any_rank
from wemmu.positions import token_grid
from wemmu.prompts import PromptEncoder
from wemmu.recipes.recipe import Recipe
from wemmu.recipes.staged import Staged
from wemmu.sampling.mode import evaluating
from wemmu.sampling.request import GenerationRequest
from wemmu.shapes.language import DESCRIBE
from wemmu.types import IGNORE_INDEX, Prompts

# Maximal number of tokens of an answer.
LIMIT = 128
# (logits [N, V] of the next tokens, their number) -> the tokens, int64 [N].
Choose = Callable[[Tensor, int], Tensor]


class TunedVLM(Staged, VLM):
    """A VLM whose language model learns. Its weights have transformers' names after `vlm.`."""

    def logits(self, states: Tensor) -> Tensor:
        """Compute logits [..., vocabulary] of states [..., D]."""
        return self.vlm.lm_head(states)

    def checkpoint_activations(self) -> None:
        """Recompute each layer of the language model in the backward pass."""
        self.language_model.gradient_checkpointing_enable({"use_reentrant": False})

    def normed(self) -> tuple[Any, ...]:
        return (self.language_model,)

    def compilable(self) -> tuple[nn.Module, ...]:
        return tuple(self.language_model.layers)


class TunesVLM(Recipe):
    """The base of recipes that tune the VLM."""

    def sources(self, every: bool = False) -> Sources:
        """Return those of the VLM, beside which a head is float32 and all else frozen."""
        return {f"vlm.{name}": source for name, source in stored_vlm(self._run.backbones.vlm, every).items()}

    def validation(self, topology: Topology, device: torch.device | str) -> NoReturn:
        raise NotImplementedError("this recipe has no validation loss; the config rejects a plateau, its only use")


def question_rows(
    encoder: PromptEncoder, texts: Sequence[str], images: Tensor, token_px: int
) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """Return token ids of each question up to where its answer begins, and the token grids of its images.

    images: [B, N, 3, H, W]; N may be 0. token_px: side of a VLM token, px.
    """
    n, height, width = images.shape[1], *images.shape[-2:]
    grids = [[token_grid(height, width, token_px)] * n if n else []] * len(texts)
    return [encoder.token_ids(text, sizes) for text, sizes in zip(texts, grids, strict=True)], grids


def labelled(states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return states, labels, rows and places of the tokens with a label.

    Logits are computed for these only: each has as many values as the vocabulary has tokens.
    """
    rows, places = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
    return states[rows, places], labels[rows, places], rows, places


def answer_losses(model: TunedVLM, states: Tensor, labels: Tensor, length: float | None = None) -> Tensor:
    """Return the cross-entropy of each sample's answers, [B]; see `answer_cross_entropy`.

    states: [B, L, D]; labels: as `Batch.labels`.
    """
    chosen, targets, rows, _ = labelled(states, labels)
    return answer_cross_entropy(model.logits(chosen), targets, rows, len(labels), length)


@torch.no_grad()
def decode(
    model: TunedVLM, prompts: Prompts, images: Tensor, choose: Choose, end: int, limit: int, group: int = 1
) -> list[list[int]]:
    """Return the tokens of `group` answers to each prompt, group after group, each with its `end` or cut at `limit`.

    The model is in eval mode. images: uint8 [B, N, 3, H, W]; N may be 0. Ranks continue until all of them have ended,
    since sharded layers are gathered.
    """
    at_images = model.image_tokens(prompts, images)
    vision = model.vision(images.flatten(0, 1)) if images.shape[1] else None
    cache, last = DynamicCache(), prompts.mask.sum(1) - 1
    options = {"use_cache": True, **with_cache(model.language_model, cache)}
    seen = model.language_model(
        **model.inputs(prompts, at_images, vision),
        # Whole, or None: else the model would ask the device for each token whether it hides anything.
        attention_mask=causal_mask(prompts.mask) if prompts.padded else None,
        position_ids=prompts.positions,
        **options,
    ).last_hidden_state
    # A prompt is read once for all of its answers.
    cache.batch_repeat_interleave(group)
    states = seen[torch.arange(len(last), device=last.device), last].repeat_interleave(group, 0)
    mask = prompts.mask.repeat_interleave(group, 0)
    place = prompts.next_position.repeat_interleave(group, 0)
    tokens: list[Tensor] = []
    ended = torch.zeros(len(states), dtype=torch.bool, device=states.device)
    for t in range(limit):
        token = choose(model.logits(states), t)
        tokens.append(token.where(~ended, end))
        ended = ended | (token == end)
        if t + 1 == limit or not any_rank(not bool(ended.all())):
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        states = model.language_model(
            inputs_embeds=model.language_model.embed_tokens(tokens[-1])[:, None],
            attention_mask=mask[:, None, None] if prompts.padded else None,
            position_ids=place.expand(3, -1)[..., None],
            **options,
        ).last_hidden_state[:, 0]
        place = place + 1
    rows: list[list[int]] = torch.stack(tokens, 1).tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def answers(
    model: TunedVLM, encoder: PromptEncoder, request: GenerationRequest, device: torch.device, limit: int = LIMIT
) -> list[str]:
    """Answer the questions of a request greedily, up to `limit` tokens each."""
    rows, grids = question_rows(encoder, request.texts, request.images, model.token_px)
    end: int = encoder.tokenizer.eos_token_id
    with evaluating(model):
        images = request.images.to(device)
        found = decode(model, encoder.pad(rows, grids).to(device), images, lambda x, _: x.argmax(-1), end, limit)
    return [encoder.tokenizer.decode(row[:-1] if row[-1] == end else row) for row in found]


class _Answering(TunedVLM):
    """A VLM that nothing trains."""

    prefixes = MappingProxyType({})


class ExportedVLM:
    """The export of a recipe that tunes a VLM, loaded to answer. origin: its stage, step and resolution."""

    def __init__(self, directory: Path, device: torch.device):
        """Raise BackboneError as `load_vlm`."""
        report = json.loads((directory / PARITY).read_text(encoding="utf-8"))
        self.origin: dict[str, Any] = report["origin"]
        # Exports of earlier versions do not say it.
        self.question: str = report.get("question") or DESCRIBE
        vlm, _ = load_vlm(directory, getattr(torch, report["dtype"]))
        pixels = AutoImageProcessor.from_pretrained(directory, use_fast=True)
        self._model = _Answering(vlm, pixels.image_mean, pixels.image_std).requires_grad_(False).eval().to(device)
        self._encoder, self._device = PromptEncoder(directory), device

    def answers(self, request: GenerationRequest) -> list[str]:
        return answers(self._model, self._encoder, request, self._device)
