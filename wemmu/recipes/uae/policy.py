"""The VLM as a policy over captions: it samples them, and scores them under the distribution it samples from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import DynamicCache

from wemmu.noise import Noise
from wemmu.parallel.topology import any_rank
from wemmu.positions import token_grid
from wemmu.prompts import PromptEncoder
from wemmu.recipes.uae.model import UAE
from wemmu.types import IGNORE_INDEX, Prompts

# (log-probabilities [N, V] of the next tokens, their number) -> the tokens, int64 [N].
Choose = Callable[[Tensor, int], Tensor]


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
        return scaled.masked_fill(self.banned.to(logits.device), float("-inf")).log_softmax(-1)

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
        """The model is in eval mode. Ranks go on until all of them have ended, since sharded layers are gathered."""
        model, prompts = self.model, self.asked(texts, images).to(images.device)
        at_images, vision = model.image_tokens(prompts, images), model.vision(images.flatten(0, 1))
        cache, last = DynamicCache(), prompts.mask.sum(1) - 1
        seen = model.language_model(
            **model.inputs(prompts, at_images, vision),
            attention_mask=prompts.mask.long(),
            position_ids=prompts.positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        # A prompt is read once for all of its captions.
        cache.batch_repeat_interleave(group)
        states = seen[torch.arange(len(last), device=last.device), last].repeat_interleave(group, 0)
        mask = prompts.mask.repeat_interleave(group, 0)
        place = prompts.next_position.repeat_interleave(group, 0)
        tokens: list[Tensor] = []
        ended = torch.zeros(len(states), dtype=torch.bool, device=states.device)
        for t in range(self.max_length):
            token = choose(self.log_distribution(model.logits(states), temperature), t)
            tokens.append(token.where(~ended, self.end))
            ended = ended | (token == self.end)
            if t + 1 == self.max_length or not any_rank(not bool(ended.all())):
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            states = model.language_model(
                inputs_embeds=model.language_model.embed_tokens(tokens[-1])[:, None],
                attention_mask=mask.long(),
                position_ids=place.expand(3, -1)[..., None],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, 0]
            place = place + 1
        return self._captions(torch.stack(tokens, 1).tolist())

    def _captions(self, rows: list[list[int]]) -> Captions:
        whole = [row[: row.index(self.end) + 1] if self.end in row else row for row in rows]
        truncated = [row[-1] != self.end for row in whole]
        return Captions(whole, [self._text(row) for row in whole], truncated)

    def _text(self, row: list[int]) -> str:
        text: str = self.encoder.tokenizer.decode(row[:-1] if row[-1] == self.end else row)
        return text.strip()

    def asked(self, texts: Sequence[str], images: Tensor) -> Prompts:
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
        height, width = images.shape[-2:]
        grid = token_grid(height, width, self.model.token_px)
        return [self.encoder.token_ids(text, [grid]) for text in texts], [[grid]] * len(texts)

    def score(
        self, prompts: Prompts, images: Tensor, labels: Tensor, temperature: float, reference: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return log pi of the labels, and the entropy where they stand: two float32 [B * G, L], 0 elsewhere."""
        states = self.model.states(prompts, images, reference)
        rows, places = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
        # Logits only where there is a label: each has as many values as the vocabulary has tokens.
        logp = self.log_distribution(self.model.logits(states[rows, places], reference), temperature)
        chosen = logp.gather(1, labels[rows, places][:, None])[:, 0]
        entropy = torch.special.entr(logp.detach().exp()).sum(-1)
        empty = torch.zeros(labels.shape, device=labels.device)
        return empty.index_put((rows, places), chosen), empty.index_put((rows, places), entropy)


def invert_cdf(logp: Tensor, uniforms: Tensor) -> Tensor:
    """Return the first token whose cumulative probability is above the uniform number: int64 [N].

    logp: [N, V]; uniforms: [N], in [0, 1). A token of probability 0 is never first.
    """
    cumulative = logp.double().exp().cumsum(-1)
    reached = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
    return (cumulative <= reached).sum(-1)
