"""Tokenizers and processor of the miniature world, in the real classes and the published layout."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2_5_VLProcessor, Qwen2TokenizerFast, Qwen2VLImageProcessorFast
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from wemmu.shapes.backbones import MERGE, PATCH_PX
from wemmu.shapes.edits import random_edit, random_two_image_edit
from wemmu.shapes.language import caption, full_caption, question
from wemmu.shapes.scene import random_scene

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# One turn of the user, its images before its words, then the assistant's; no system turn, to keep sequences short.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def corpus(lines: int = 20_000, seed: int = 0) -> list[str]:
    """Return sentences of the miniature; enough that every word is frequent."""
    rng = random.Random(seed)
    texts = ["user", "assistant", "describe the image", "describe the second image"] * 50
    while len(texts) < lines:
        scene = random_scene(rng)
        ask, answer = question(scene, rng)
        texts += [caption(scene, rng), full_caption(scene), ask, answer, " " + answer]
        texts += [random_edit(rng).instruction, random_two_image_edit(rng).instruction]
    return texts


def train_tokenizer(out: Path) -> Qwen2TokenizerFast:
    """Train a byte-level BPE in which every word of the miniature is one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE())
    out.mkdir(parents=True, exist_ok=True)
    # Text is cut into words as Qwen2's own class cuts it, so that a vocabulary trained on the cut is used whole.
    (out / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(alphabet)}), encoding="utf-8")
    (out / "merges.txt").write_text("", encoding="utf-8")
    empty = Qwen2TokenizerFast(str(out / "vocab.json"), str(out / "merges.txt"))
    tokenizer.pre_tokenizer = empty.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=20, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.model.save(str(out))
    return Qwen2TokenizerFast(
        str(out / "vocab.json"),
        str(out / "merges.txt"),
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
    )


def save_processor(out: Path) -> Qwen2_5_VLProcessor:
    """Train the tokenizer and write the whole processor to `out`; returns it as loaded from there."""
    tokenizer = train_tokenizer(out)
    pixels = {
        "patch_size": PATCH_PX,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": (PATCH_PX * MERGE) ** 2, "longest_edge": 512 * 512},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessorFast(**pixels), tokenizer, Qwen2VLVideoProcessor(**pixels), chat_template=CHAT_TEMPLATE
    )
    processor.save_pretrained(out)
    return Qwen2_5_VLProcessor.from_pretrained(out)


def special_ids(processor: Any) -> dict[str, int]:
    """Return the special tokens under the names that `Qwen2_5_VLConfig` gives them."""
    ids: Callable[[str], int] = processor.tokenizer.convert_tokens_to_ids
    return {
        "bos_token_id": ids("<|endoftext|>"),
        "eos_token_id": ids("<|im_end|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
        "vision_token_id": ids("<|vision_pad|>"),
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
    }
