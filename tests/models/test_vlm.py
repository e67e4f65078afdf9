"""The frozen side: what the VLM is fed is what its own processor feeds it, and nothing of it can learn."""

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorFast,
)

from tests.models.world import WORDS, encode, make_batch, make_model, random_images
from wemmu.backbones.vlm import FrozenVLM
from wemmu.config.schema import Backbones
from wemmu.config.task import Task
from wemmu.noise import Noise
from wemmu.prompts import PromptEncoder
from wemmu.recipes.wemmu.model import WeMMU

# The preprocessor of the published Qwen2.5-VL-3B-Instruct.
PUBLISHED = {
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 56 * 56, "longest_edge": 12845056},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


class _Fed(Exception):
    """Stops a forward pass as soon as the vision tower has its inputs."""


def fed_to_the_tower(vlm: FrozenVLM, pixels: Tensor) -> Tensor:
    """The patches that images [B, 3, H, W] become on their way into the vision tower."""
    caught: list[Tensor] = []

    def stop(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        caught.append(inputs[0])
        raise _Fed

    hook = vlm.vlm.model.visual.patch_embed.register_forward_pre_hook(stop)
    try:
        with pytest.raises(_Fed):
            vlm.vision(pixels)
    finally:
        hook.remove()
    return caught[0]


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (16, 80)], ids=str)
def test_patches_equal_those_of_the_real_processor(model: WeMMU, backbones: Backbones, size: tuple[int, int]):
    images = random_images(1, 3, 3, *size)
    real = Qwen2VLImageProcessorFast.from_pretrained(backbones.vlm)
    expected = real(images=[*images], return_tensors="pt").pixel_values
    torch.testing.assert_close(fed_to_the_tower(model.vlm, images), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("size", "grid"), [((512, 512), (36, 36)), ((1024, 512), (74, 36))], ids=str)
def test_patches_equal_the_published_processors_where_it_resizes(
    model: WeMMU, size: tuple[int, int], grid: tuple[int, int]
):
    vlm = FrozenVLM(model.vlm.vlm, PUBLISHED["image_mean"], PUBLISHED["image_std"])
    vlm.patch, vlm.token_px = 14, 28
    # Hard edges, at which the resized image overshoots the range of pixels, and a smooth one.
    edges = torch.where(torch.arange(512) % 64 < 32, 255, 0).to(torch.uint8).expand(3, *size)
    smooth = F.interpolate(random_images(2, 1, 3, 64, 64).float(), size, mode="bilinear")[0].byte()
    images = torch.stack([edges, smooth])
    expected = Qwen2VLImageProcessorFast(**PUBLISHED)(images=[*images], return_tensors="pt")
    assert expected.image_grid_thw.tolist() == [[1, *grid]] * 2, "512 px become 504, 1024 px 1036"
    one_level = 1 / 255 / min(PUBLISHED["image_std"])
    fed = fed_to_the_tower(vlm, images)
    torch.testing.assert_close(fed, expected.pixel_values, atol=1.01 * one_level, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("task", [Task.T2I, Task.EDIT, Task.MULTI_EDIT])
def test_a_prefix_is_the_vlms_own_cache_of_its_processors_output(
    model: WeMMU, backbones: Backbones, encoder: PromptEncoder, task: Task
):
    batch = make_batch(encoder, [0], task, size=(48, 32))
    ours = model.vlm.prefix(batch.prompts, batch.images)
    processor = AutoProcessor.from_pretrained(backbones.vlm, use_fast=True)
    chat = encoder.chat(WORDS[0], batch.images.shape[1])
    inputs = processor(text=[chat], images=[*batch.images[0]] or None, return_tensors="pt")
    own = model.vlm.vlm.model(**inputs, use_cache=True).past_key_values.layers
    for keys, values, layer in zip(ours.keys, ours.values, own, strict=True):
        # Ours goes one token further, to the vision_start that the VLM has no positions for without an image after it.
        torch.testing.assert_close(keys[:, :, :-1], layer.keys, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(values[:, :, :-1], layer.values, atol=1e-5, rtol=1e-4)


def test_a_prompt_in_a_padded_batch_has_the_prefix_it_has_alone(model: WeMMU, encoder: PromptEncoder):
    batch = make_batch(encoder, [0, 1, 2, 3])
    together = model.vlm.prefix(batch.prompts, batch.images)
    assert not together.mask.all(), "nothing is padded, so this proves nothing"
    for b, sample in enumerate([0, 1, 2, 3]):
        alone_batch = make_batch(encoder, [sample])
        alone = model.vlm.prefix(alone_batch.prompts, alone_batch.images)
        for ours, single in zip(together.keys + together.values, alone.keys + alone.values, strict=True):
            torch.testing.assert_close(ours[b, :, together.mask[b]], single[0], atol=1e-5, rtol=1e-4)
        assert torch.equal(together.image_positions[:, b], alone.image_positions[:, 0])


def test_each_image_of_a_prompt_matters_and_so_does_their_order(model: WeMMU, encoder: PromptEncoder):
    batch = make_batch(encoder, [0, 1], Task.MULTI_EDIT)
    straight = model.vlm.prefix(batch.prompts, batch.images).values[-1]
    swapped = model.vlm.prefix(batch.prompts, batch.images.flip(1)).values[-1]
    mixed_up = model.vlm.prefix(batch.prompts, batch.images.flip(0)).values[-1]
    assert (straight - swapped).abs().max() > 1e-4
    assert (straight - mixed_up).abs().max() > 1e-4


def test_a_prefix_leaves_no_autograd_node(model: WeMMU, encoder: PromptEncoder):
    batch = make_batch(encoder, [0, 1])
    with torch.enable_grad():
        prefix = model.vlm.prefix(batch.prompts, batch.images)
        latents = model.input_latents(batch.images)
    assert not any(t.requires_grad or t.grad_fn for t in chain(prefix.keys, prefix.values, [latents]))


def test_a_backward_pass_leaves_no_gradient_on_the_frozen_side(backbones: Backbones, encoder: PromptEncoder):
    model = make_model(backbones)
    batch = make_batch(encoder, [0, 1])
    condition = model.condition(batch.prompts, batch.images, (32, 32), Noise(0, 0, batch.sample_ids))
    condition.states.square().sum().backward()
    assert model.bridge.pathway.layers[0].self_attn.q_proj.weight.grad is not None
    frozen = [*model.vlm.named_parameters(), *model.vae.named_parameters()]
    assert [name for name, p in frozen if p.grad is not None or p.requires_grad] == []


def test_the_frozen_side_stays_in_eval_mode(backbones: Backbones):
    model = make_model(backbones).train()
    assert model.dit.training
    assert model.bridge.pathway.training
    assert not any(m.training for m in chain(model.vlm.modules(), model.vae.modules()))


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), nn.Module.half], ids=["to", "half"])
@pytest.mark.parametrize("part", ["vlm", "vlm.vlm", "vlm.vlm.model.language_model", "bridge.pathway", ""])
def test_casting_leaves_positions_and_pixels_in_float32(backbones: Backbones, cast: Callable, part: str):
    """Of the whole, or of any part that a pipeline or an engine may cast alone."""
    model = make_model(backbones)
    before = {n: b.clone() for n, b in model.named_buffers() if n.endswith(("inv_freq", "mean", "std"))}
    images = random_images(0, 1, 3, 40, 40)
    patches = fed_to_the_tower(model.vlm, images)
    cast(model.get_submodule(part))
    assert {p.dtype for p in model.get_submodule(part).parameters()} <= {torch.bfloat16, torch.float16}
    after = dict(model.named_buffers())
    assert len(before) >= 5
    assert all(torch.equal(after[name], buffer) for name, buffer in before.items())
    assert torch.equal(fed_to_the_tower(model.vlm, images), patches)
    # A copy of a cast module keeps them, too.
    assert deepcopy(model.vlm.language_model.rotary_emb).half().inv_freq.dtype == torch.float32


def test_a_vlm_that_was_cast_before_is_refused(backbones: Backbones):
    vlm = Qwen2_5_VLForConditionalGeneration.from_pretrained(backbones.vlm)
    with pytest.raises(ValueError, match=r"frequencies were cast to torch.bfloat16.* from_pretrained"):
        FrozenVLM(vlm.to(torch.bfloat16), [0.5] * 3, [0.5] * 3)


@pytest.mark.parametrize("images", [(2, 0), (2, 2), (2, 1)], ids=["none", "two", "larger"])
def test_images_that_do_not_match_the_prompts_tokens_are_refused(model: WeMMU, encoder: PromptEncoder, images):
    batch = make_batch(encoder, [0, 1], size=(32, 32))
    wrong = random_images(0, *images, 3, *((32, 32) if images[1] != 1 else (48, 32)))
    with pytest.raises(ValueError, match="image tokens, got"):
        model.vlm.prefix(batch.prompts, wrong)


def test_image_tokens_of_one_prompt_do_not_make_up_for_those_of_another(model: WeMMU, encoder: PromptEncoder):
    batch = make_batch(encoder, [0, 1])
    one = encoder.token_ids("", [(2, 2)])
    prompts = encoder.pad([one + one, encoder.token_ids("", [])], [[(2, 2)] * 2, []])
    with pytest.raises(ValueError, match=r"\[8, 0\]"):
        model.vlm.prefix(prompts, batch.images)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_prompt_ids_are_the_real_processors_then_vision_start(backbones: Backbones, encoder: PromptEncoder, count: int):
    processor = AutoProcessor.from_pretrained(backbones.vlm, use_fast=True)
    images = random_images(0, 1, count, 3, 48, 32)
    text = "swap the red circle and the blue ring"
    content = [*[{"type": "image"}] * count, {"type": "text", "text": text}]
    chat = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    expected = processor(text=[chat], images=[*images[0]] or None)["input_ids"][0]
    vision_start = processor.tokenizer.convert_tokens_to_ids("<|vision_start|>")
    assert encode(encoder, [text], images).input_ids[0].tolist() == [*expected, vision_start]


def test_special_tokens_in_what_people_write_are_text(backbones: Backbones, encoder: PromptEncoder):
    """All of the tokenizer's, in instructions and in answers: only the chat format has its ids."""
    tokenizer = AutoProcessor.from_pretrained(backbones.vlm, use_fast=True).tokenizer
    tokenizer.add_tokens(["<|unnamed|>"], special_tokens=True)
    encoder = PromptEncoder(processor_with(backbones, tokenizer))
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert len(special) == 9
    chat = {n: Counter(encoder.token_ids("a ring", [(2, 3)] * n)) for n in range(3)}
    for number, token in special.items():
        for count in range(3):
            text = f"{token}a ring{token} \n{token}"
            ids = encoder.token_ids(text, [(2, 3)] * count)
            assert Counter(ids)[number] == chat[count][number], token
            assert tokenizer.decode(ids).replace("<|image_pad|>" * 6, "<|image_pad|>") == encoder.chat(text, count)
        answer = encoder.answer_ids(f"yes{token}")
        assert answer.count(number) == (number == tokenizer.eos_token_id)
        assert tokenizer.decode(answer[:-1]) == f"yes{token}"
        prompts, _ = encoder.answered([token], [token], [[(2, 2)]])
        assert (prompts.input_ids == encoder.image_token_id).sum() == 4


@pytest.mark.parametrize("text", ["a ring", " a ring ", "\n\na ring\n", "", "3 rings\u2028", "<|im_end", "caf\u00e9"])
def test_a_text_without_special_tokens_has_the_ids_of_the_whole_chat(encoder: PromptEncoder, text: str):
    expected = encoder.tokenizer(encoder.chat(text, 1), add_special_tokens=False)["input_ids"]
    assert encoder.token_ids(text, [(1, 1)]) == expected


def processor_with(backbones: Backbones, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    processor = AutoProcessor.from_pretrained(backbones.vlm, use_fast=True)
    processor.tokenizer = tokenizer
    return processor
