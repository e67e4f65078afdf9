"""The VLM as a policy over captions: it samples them, and scores them under the distribution it samples from."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from wemmu.noise import Noise
from wemmu.prompts import PromptEncoder
from wemmu.recipes.tuned_vlm import Choose, decode, labelled, question_rows
from wemmu.recipes.uae.model import UAE
from wemmu.types import IGNORE_INDEX, Prompts


@dataclass(frozen=True)
class Captions:
    """Captions as tokens, each with its end unless it was cut at the limit; group after group.

    texts: without the end. truncated: which were cut.
    """

    tokens: list[list[int]]
    texts: list[str]
    truncated: list[bool]


class Policy:
    """Captions by a `UAE` model. All ranks of a sharded one call its methods alike."""

    def __init__(self, model: UAE, encoder: PromptEncoder, max_length: int):
        self.model, self.encoder, self.max_length = model, encoder, max_length

    @cached_property
    def end(self) -> int:
        """The token that ends a caption."""
        return int(self.encoder.tokenizer.eos_token_id)

    @cached_property
    def banned(self) -> Tensor:
        """Which tokens no caption may hold: bool [V]. All special tokens but the end, and ids without a token.

        A caption with an image token would claim an image where it is read again.
        """
        tokenizer = self.encoder.tokenizer
        banned = torch.zeros(self.model.vlm.lm_head.out_features, dtype=torch.bool)
        banned[len(tokenizer) :] = True
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        banned[sorted((special | set(tokenizer.all_special_ids)) - {self.end})] = True
        return banned

    def log_distribution(self, logits: Tensor, temperature: float) -> Tensor:
        """Return log pi of the next token, float32 [..., V]: at the temperature of sampling, without banned tokens."""
        scaled = logits.float() / temperature
        banned = self.banned.to(logits.device, non_blocking=True)
        return scaled.masked_fill(banned, float("-inf")).log_softmax(-1)

    @torch.no_grad()
    def sample(self, instruction: str, images: Tensor, noise: Noise, group: int, temperature: float) -> Captions:
        """Sample `group` captions of each image, uint8 [B, 1, 3, H, W].

        Every token is the inverse of the cumulative distribution at a uniform number keyed by seed, step, sample,
        member of the group and place in the caption. So the same weights sample the same captions after a resume.
        """
        keyed = [noise.uniform(f"caption/{member}", (self.max_length,)) for member in range(group)]
        uniforms = torch.stack(keyed, 1).flatten(0, 1)  # [B * G, max length]
        return self._generate(
            [instruction] * len(images), images, group, temperature, lambda logp, t: invert_cdf(logp, uniforms[:, t])
        )

    @torch.no_grad()
    def most_likely(self, texts: Sequence[str], images: Tensor) -> Captions:
        """Answer each text about its image with the most likely token at every place."""
        return self._generate(texts, images, 1, 1.0, lambda logp, _: logp.argmax(-1))

    def _generate(
        self, texts: Sequence[str], images: Tensor, group: int, temperature: float, choose: Choose
    ) -> Captions:
        """The model is in eval mode."""
        prompts = self.encode(texts, images).to(images.device)
        rows = decode(
            self.model, prompts, images, lambda logits, t: choose(self.log_distribution(logits, temperature), t),
            self.end, self.max_length, group,
        )  # fmt: skip
        return Captions(rows, [self._text(row) for row in rows], [row[-1] != self.end for row in rows])

    def _text(self, row: list[int]) -> str:
        text: str = self.encoder.tokenizer.decode(row[:-1] if row[-1] == self.end else row)
        return text.strip()

    def given(self, labels: Tensor) -> Captions:
        """Return the captions that labels hold, see `Batch.labels`."""
        rows = [row[row != IGNORE_INDEX].tolist() for row in labels.cpu()]
        return Captions(rows, [self._text(row) for row in rows], [False] * len(rows))

    def encode(self, texts: Sequence[str], images: Tensor) -> Prompts:
        """Return the prompts of the images up to where the captions begin."""
        rows, grids = self._rows(texts, images)
        return self.encoder.pad(rows, grids)

    def captioned(self, instruction: str, images: Tensor, tokens: Sequence[list[int]]) -> tuple[Prompts, Tensor]:
        """Return the prompts with their captions, and labels as in `Batch.labels`: [B * G, L]."""
        group = len(tokens) // len(images)
        (row, *_), (sizes, *_) = self._rows([instruction], images)
        prompts = self.encoder.pad([row + caption for caption in tokens], [sizes] * len(images) * group)
        labels = torch.full_like(prompts.input_ids, IGNORE_INDEX)
        for b, caption in enumerate(tokens):
            labels[b, len(row) - 1 : len(row) - 1 + len(caption)] = torch.tensor(caption)
        return prompts, labels

    def _rows(self, texts: Sequence[str], images: Tensor) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        return question_rows(self.encoder, texts, images, self.model.token_px)

    def score(
        self, prompts: Prompts, images: Tensor, labels: Tensor, temperature: float, reference: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return log pi of the labels, and the entropy where they stand: two float32 [B * G, L], 0 elsewhere."""
        states = self.model.states(prompts, images, reference)
        there, targets, rows, places = labelled(states, labels)
        logp = self.log_distribution(self.model.logits(there, reference), temperature)
        chosen = logp.gather(1, targets[:, None])[:, 0]
        entropy = torch.special.entr(logp.detach().exp()).sum(-1)
        empty = torch.zeros(labels.shape, device=labels.device)
        return empty.index_put((rows, places), chosen), empty.index_put((rows, places), entropy)


def invert_cdf(logp: Tensor, uniforms: Tensor) -> Tensor:
    """Return the first token whose cumulative probability is above the uniform number: int64 [N].

    logp: [N, V]; uniforms: [N], in [0, 1). A token of probability 0 is never first.
    """
    cumulative = logp.double().exp().cumsum(-1)
    reached = uniforms.double()[:, None] * cumulative[:, -1:]
    return (cumulative <= reached).sum(-1)
