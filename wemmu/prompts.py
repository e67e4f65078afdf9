"""Words and pictures -> the token ids, mask and positions of a batch of prompts for the VLM."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoProcessor, ProcessorMixin

from wemmu.positions import prompt_positions
from wemmu.types import UNASKED, Prompts


class PromptEncoder:
    """Writes prompts in the VLM's own chat format, ending where the assistant's picture would begin.

    The assistant's turn is opened and then `<|vision_start|>` follows, because that is what stands before every image
    the VLM has ever seen: the tokens of the generation pathway, image-form themselves, come right after it.
    """

    def __init__(self, vlm: str | Path | ProcessorMixin):
        """`vlm` is the VLM's directory, or its processor where that is loaded already."""
        loaded = isinstance(vlm, ProcessorMixin)
        self._processor = vlm if loaded else AutoProcessor.from_pretrained(vlm, use_fast=True)
        self.tokenizer = self._processor.tokenizer
        ids = self.tokenizer.convert_tokens_to_ids
        self.image_token_id: int = ids("<|image_pad|>")
        self._special: list[str] = self.tokenizer.all_special_tokens
        self._vision_start: int = ids("<|vision_start|>")
        self.pad_token_id: int = self.tokenizer.pad_token_id
        self._chat: dict[int, tuple[str, str]] = {}

    def chat(self, text: str, images: int) -> str:
        """The chat format with `images` pictures before `text`, up to and including the assistant's opening."""
        if images not in self._chat:
            # Render the template once for each number of images; the text goes in by splitting around a marker.
            marker = "\u241f"
            content = [{"type": "image"}] * images + [{"type": "text", "text": marker}]
            messages = [{"role": "user", "content": content}]
            rendered = self._processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            before, after = rendered.split(marker)
            self._chat[images] = before, after
        before, after = self._chat[images]
        return before + text + after

    def token_ids(self, text: str, grids: Sequence[tuple[int, int]]) -> list[int]:
        """Ids of one chat prompt with every image placeholder expanded to its number of tokens.

        Raises:
            ValueError: if the text itself holds one of the VLM's special tokens, which would be read as the format's.
        """
        self._check(text)
        ids: list[int] = []
        sizes = iter(grids)
        for token in self.tokenizer(self.chat(text, len(grids)), add_special_tokens=False)["input_ids"]:
            if token == self.image_token_id:
                height, width = next(sizes)
                ids += [token] * (height * width)
            else:
                ids.append(token)
        return ids

    def __call__(self, texts: Sequence[str], grids: Sequence[Sequence[tuple[int, int]]]) -> Prompts:
        """Encode a batch. `grids[b]` lists the (height, width) in VLM tokens of each image of sample b."""
        rows = [[*self.token_ids(text, sizes), self._vision_start] for text, sizes in zip(texts, grids, strict=True)]
        return self.pad(rows, grids)

    def answered(
        self, texts: Sequence[str], answers: Sequence[str], grids: Sequence[Sequence[tuple[int, int]]]
    ) -> tuple[Prompts, torch.Tensor]:
        """Encode questions with their answers, and what is to be predicted of them: see `Batch.wanted`."""
        asked = [self.token_ids(text, sizes) for text, sizes in zip(texts, grids, strict=True)]
        said = [self.answer_ids(answer) for answer in answers]
        prompts = self.pad([a + b for a, b in zip(asked, said, strict=True)], grids)
        wanted = torch.full_like(prompts.input_ids, UNASKED)
        for row, a, b in zip(wanted, asked, said, strict=True):
            row[len(a) - 1 : len(a) - 1 + len(b)] = torch.tensor(b)
        return prompts, wanted

    def answer_ids(self, answer: str) -> list[int]:
        """Ids of an answer and of its end; raises as `token_ids`."""
        self._check(answer)
        return [*self.tokenizer(answer, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]

    def _check(self, text: str) -> None:
        if found := [token for token in self._special if token in text]:
            raise ValueError(f"the prompt {text!r} holds the VLM's special token {found[0]}; leave it out")

    def pad(self, rows: Sequence[list[int]], grids: Sequence[Sequence[tuple[int, int]]]) -> Prompts:
        """Pad ready token ids to one length and count their positions."""
        length = max(map(len, rows))
        input_ids = torch.full((len(rows), length), self.pad_token_id)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        positions = torch.zeros(3, len(rows), length, dtype=torch.long)
        next_position = torch.zeros(len(rows), dtype=torch.long)
        for b, (row, sizes) in enumerate(zip(rows, grids, strict=True)):
            input_ids[b, : len(row)] = torch.tensor(row)
            mask[b, : len(row)] = True
            positions[:, b, : len(row)], next_position[b] = prompt_positions(row, self.image_token_id, list(sizes))
        return Prompts(input_ids, mask, positions, next_position)
