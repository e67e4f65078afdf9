"""Words and images -> the token ids, mask and positions of a batch of prompts for the VLM."""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, ProcessorMixin

from wemmu.config.exported import processor_folder
from wemmu.positions import prompt_positions
from wemmu.published.layout import BackboneError, read_json
from wemmu.types import IGNORE_INDEX, Prompts


@dataclass(frozen=True)
class _Format:
    """The chat format around a text. `lead` and `tail` reach from the text to the nearest special tokens."""

    before: list[int]
    lead: str
    tail: str
    after: list[int]


class PromptEncoder:
    """Writes prompts in the VLM's own chat format, ending where the assistant's image would begin.

    The prompt opens the assistant's turn and ends with `<|vision_start|>`, the token before every image in the VLM's
    training: the tokens of the generation pathway, in image form, follow it.
    """

    def __init__(self, vlm: str | Path | ProcessorMixin):
        """`vlm` is the VLM's directory, or its processor where that is loaded already.

        Raises:
            BackboneError: if the directory's files are broken, or do not belong to the VLM in it.
        """
        self._chat: dict[int, tuple[str, str]] = {}
        # Of a class of the checkpoint.
        self._processor: Any = vlm
        if not isinstance(vlm, ProcessorMixin):
            folder = processor_folder(Path(vlm))
            try:
                self._processor = AutoProcessor.from_pretrained(folder, use_fast=True)
                self._around(1)
            except Exception as error:  # the tokenizers' own have no class
                raise BackboneError(
                    f"tokenizer, processor and chat template of {folder} cannot write a prompt: "
                    f"{type(error).__name__}: {error}; download their files again"
                ) from error
        self.tokenizer = self._processor.tokenizer
        # A second tokenizer for users' text, which reads special tokens as text. A copy, because the switch is part of
        # a fast tokenizer's state, which threads share.
        self._writing = copy.deepcopy(self.tokenizer)
        ids = self.tokenizer.convert_tokens_to_ids
        self.image_token_id: int = ids("<|image_pad|>")
        # A processor may stand alone.
        file = None if isinstance(vlm, ProcessorMixin) else Path(vlm) / "config.json"
        if file and file.is_file() and (of_model := read_json(file).get("image_token_id")) != self.image_token_id:
            raise BackboneError(
                f"{file} has the image_token_id {of_model}, but <|image_pad|> is {self.image_token_id} in the "
                f"tokenizer of {vlm}; they must be of the same model"
            )
        self.vision_start_id: int = ids("<|vision_start|>")
        self.pad_token_id: int = self.tokenizer.pad_token_id
        self._format: dict[int, _Format] = {}
        self._later: _Format | None = None

    def chat(self, text: str, images: int) -> str:
        """Return the chat format with `images` images before `text`, up to and including the assistant's opening."""
        before, after = self._around(images)
        return before + text + after

    def _around(self, images: int) -> tuple[str, str]:
        if images not in self._chat:
            # Render the template once for each number of images; the text goes in by splitting around a marker.
            marker = "\u241f"
            content = [{"type": "image"}] * images + [{"type": "text", "text": marker}]
            messages = [{"role": "user", "content": content}]
            rendered = self._processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            before, after = rendered.split(marker)
            self._chat[images] = before, after
        return self._chat[images]

    def token_ids(self, text: str, grids: Sequence[tuple[int, int]]) -> list[int]:
        """Return the ids of one chat prompt with every image placeholder expanded to its number of tokens.

        Only the chat format has special tokens. A text that spells one, "<|endoftext|>" say, has the ids of its
        characters, so no caption, instruction or answer can end a turn or claim an image.
        """
        if len(grids) not in self._format:
            self._format[len(grids)] = self._split(*self._around(len(grids)))
        chat = self._format[len(grids)]
        ids: list[int] = []
        sizes = iter(grids)
        for token in chat.before:
            if token == self.image_token_id:
                height, width = next(sizes)
                ids += [token] * (height * width)
            else:
                ids.append(token)
        return ids + self._text_ids(chat.lead + text + chat.tail) + chat.after

    def _split(self, before: str, after: str) -> "_Format":
        """The format in pieces that are tokenized apart: it is what a tokenizer does at special tokens itself."""
        special = "|".join(re.escape(token) for token in self._special_tokens())
        ends = [m.end() for m in re.finditer(special, before)] or [0]
        begins = [m.start() for m in re.finditer(special, after)] or [len(after)]
        tokens = self.tokenizer
        return _Format(
            before=tokens(before[: ends[-1]], add_special_tokens=False)["input_ids"],
            lead=before[ends[-1] :],
            tail=after[: begins[0]],
            after=tokens(after[begins[0] :], add_special_tokens=False)["input_ids"],
        )

    def _special_tokens(self) -> list[str]:
        """Also those that the tokenizer has without a name for their use; longest first, for a regular expression."""
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return sorted({*added, *self.tokenizer.all_special_tokens}, key=len, reverse=True)

    def _text_ids(self, text: str) -> list[int]:
        return self._writing(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def __call__(self, texts: Sequence[str], grids: Sequence[Sequence[tuple[int, int]]]) -> Prompts:
        """Encode a batch. `grids[b]` lists the (height, width) in VLM tokens of each image of sample b."""
        rows = [[*self.token_ids(text, sizes), self.vision_start_id] for text, sizes in zip(texts, grids, strict=True)]
        return self.pad(rows, grids)

    def answered(
        self, texts: Sequence[str], answers: Sequence[str], grids: Sequence[Sequence[tuple[int, int]]]
    ) -> tuple[Prompts, torch.Tensor]:
        """Encode questions with their answers, and what is to be predicted of them: see `Batch.labels`."""
        return self.conversations([[turn] for turn in zip(texts, answers, strict=True)], grids)

    def conversations(
        self, turns: Sequence[Sequence[tuple[str, str]]], grids: Sequence[Sequence[tuple[int, int]]]
    ) -> tuple[Prompts, torch.Tensor]:
        """Encode several turns as `answered` does; all images precede the first question.

        To be predicted are the answers of all turns with their ends, and nothing else.
        """
        rows, places = [], []
        for conversation, sizes in zip(turns, grids, strict=True):
            row: list[int] = []
            answers: list[tuple[int, list[int]]] = []
            for asked, said in conversation:
                row += self._next_ids(asked) if row else self.token_ids(asked, sizes)
                answer = self.answer_ids(said)
                answers.append((len(row) - 1, answer))
                row += answer
            rows.append(row)
            places.append(answers)
        prompts = self.pad(rows, grids)
        labels = torch.full_like(prompts.input_ids, IGNORE_INDEX)
        for row_labels, answers in zip(labels, places, strict=True):
            for place, answer in answers:
                row_labels[place : place + len(answer)] = torch.tensor(answer)
        return prompts, labels

    def _next_ids(self, text: str) -> list[int]:
        """Ids of a further question, from behind the end token of the answer before it to where its answer begins."""
        if self._later is None:
            marks = "\u241f", "\u241e", "\u241d"
            messages = [
                {"role": role, "content": [{"type": "text", "text": mark}]}
                for role, mark in zip(("user", "assistant", "user"), marks, strict=True)
            ]
            rendered = self._processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            between, after = rendered.split(marks[1])[1].split(marks[2])
            end = self.tokenizer.decode([self.tokenizer.eos_token_id])
            self._later = self._split(between.removeprefix(end), after)
        chat = self._later
        return chat.before + self._text_ids(chat.lead + text + chat.tail) + chat.after

    def answer_ids(self, answer: str) -> list[int]:
        """Return the ids of an answer and of its end; special tokens in it are text, as in `token_ids`."""
        return [*self._text_ids(answer), self.tokenizer.eos_token_id]

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
        image_tokens = tuple(row.count(self.image_token_id) for row in rows)
        padded = any(len(row) < length for row in rows)
        return Prompts(input_ids, mask, positions, next_position, padded, image_tokens)
