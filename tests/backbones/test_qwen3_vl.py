"""Qwen3-VL as the VLM of a stage: its real class, tiny, from a directory in the published layout."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoProcessor,
    Qwen2VLImageProcessorFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tests.checkpoints import differing
from tests.models.world import make_batch, make_model
from tests.parallel.cases import Case, merged, single
from tests.parallel.test_zero3 import check, on
from tests.published import replicas
from wemmu.backbones.versions import image_kinds
from wemmu.backbones.weights import load_vlm
from wemmu.config.schema import Backbones
from wemmu.config.task import Task
from wemmu.prompts import PromptEncoder
from wemmu.published.check import problems
from wemmu.recipes.wemmu.component import WeMMUBridge
from wemmu.recipes.wemmu.config import Bridge, Queries
from wemmu.recipes.wemmu.model import WeMMU
from wemmu.shapes.processor import CHAT_TEMPLATE, special_ids, train_tokenizer

PATCH_PX, WIDTH = 8, 64
TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


@pytest.fixture(scope="module")
def qwen3(backbones: Backbones, tmp_path_factory: pytest.TempPathFactory) -> Backbones:
    folder = tmp_path_factory.mktemp("qwen3") / "vlm"
    pixels = {"patch_size": PATCH_PX, "merge_size": 2, "temporal_patch_size": 2, "image_mean": [0.5] * 3}
    pixels |= {"image_std": [0.5] * 3, "size": {"shortest_edge": 16**2, "longest_edge": 512**2}}
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessorFast(**pixels),
        train_tokenizer(folder),
        Qwen3VLVideoProcessor(**pixels),
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)
    ids = special_ids(processor)
    torch.manual_seed(2)
    config = Qwen3VLConfig(
        text_config={
            "tie_word_embeddings": True,
            "vocab_size": len(processor.tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            # As in Qwen3-VL-4B, heads are wider than their share of the hidden size.
            "head_dim": 32,
            "rope_theta": 100.0,
            "rope_scaling": {"rope_type": "default", "mrope_section": [4, 6, 6], "mrope_interleaved": True},
        },
        vision_config={
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "patch_size": PATCH_PX,
            "spatial_merge_size": 2,
            "out_hidden_size": WIDTH,
            "deepstack_visual_indexes": [0, 2],
            "num_position_embeddings": 64,
        },
        tie_word_embeddings=True,
        **{name: ids[name] for name in TOKENS},
    )
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    return backbones.model_copy(update={"vlm": folder})


@pytest.fixture(scope="module")
def model(qwen3: Backbones) -> WeMMU:
    return make_model(qwen3)


@torch.no_grad()
def test_the_prefix_is_what_the_stock_model_keeps(qwen3: Backbones, model: WeMMU):
    """Keys and values of every layer, with the features that DeepStack adds, and positions counted as its own."""
    encoder = PromptEncoder(qwen3.vlm)
    batch = make_batch(encoder, [1, 2], Task.MULTI_EDIT)
    prefix = model.vlm.prefix(batch.prompts, batch.images)
    stock = Qwen3VLForConditionalGeneration.from_pretrained(qwen3.vlm).eval()
    processor = AutoProcessor.from_pretrained(qwen3.vlm)
    for row, mask in enumerate(batch.prompts.mask):
        # Without the start of the image to be made, of which the stock model would want the tokens.
        ids = batch.prompts.input_ids[row][mask][:-1]
        images = [image.permute(1, 2, 0).numpy() for image in batch.images[row]]
        seen = processor.image_processor(images, return_tensors="pt", do_resize=False)
        kept = stock.model(input_ids=ids[None], use_cache=True, **seen, **image_kinds(stock, ids[None])).past_key_values
        for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            for ours, theirs in ((keys, kept.layers[layer].keys), (values, kept.layers[layer].values)):
                torch.testing.assert_close(ours[row, :, : len(ids)], theirs[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_without_a_cache_words_see_the_image_before_them(qwen3: Backbones, model: WeMMU):
    """As ROSS and UAE run it; the positions of an image's tokens do not count up, although it is one sequence."""
    batch = make_batch(PromptEncoder(qwen3.vlm), [1, 1], Task.RECONSTRUCTION)
    prompts, vlm = batch.prompts, model.vlm
    assert not prompts.padded
    at_images = vlm.image_tokens(prompts, batch.images)
    inputs = vlm.inputs(prompts, at_images, vlm.vision(batch.images.flatten(0, 1)))
    ours, stock = (
        vlm.language_model(
            **inputs, attention_mask=mask, position_ids=prompts.positions, use_cache=False
        ).last_hidden_state
        for mask in (vlm.mask_without_cache(prompts), prompts.mask.long())
    )
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-4)


def test_the_published_layout_loads_as_the_same_model(qwen3: Backbones, tmp_path: Path):
    """Nested config, one file without the head that shares the embedding's weights, pickles beside it."""
    stock = Qwen3VLForConditionalGeneration.from_pretrained(qwen3.vlm, dtype=torch.bfloat16)
    config = json.loads((qwen3.vlm / "config.json").read_text())
    replicas.qwen3_vl(tmp_path, stock, config, qwen3.vlm)
    loaded, report = load_vlm(tmp_path, torch.bfloat16)
    assert not report.missing
    assert differing(loaded.state_dict(), stock.state_dict()) == []
    assert problems(qwen3.model_copy(update={"vlm": tmp_path}), ("vlm",)) == []


def test_tokens_latents_and_patches_are_one_grid(model: WeMMU):
    """At the published sizes, too: tokens of 2 x 16 px, latents of 32 px. So stored latents serve the inputs."""
    stored = torch.randn(1, 1, model.vae.latent_channels, 2, 2)
    images = torch.zeros(1, 1, 3, 32, 32, dtype=torch.uint8)
    assert torch.equal(model.input_latents(images, stored), stored)


@pytest.mark.slow
def test_a_stage_trains_on_one_device_as_on_two(qwen3: Backbones):
    case = Case(tasks=(Task.EDIT, Task.T2I))
    reference = merged([single(case, qwen3)])
    assert reference.weights.keys() == {n for n, p in case.model(qwen3).named_parameters() if p.requires_grad}
    check(on(2, qwen3, {"case": case})["case"], reference)


def test_the_bridge_is_saved_and_loaded_as_a_component(model: WeMMU, tmp_path: Path):
    bridge = WeMMUBridge.of(model, Bridge(position_table=8, queries=Queries(number=9)))
    bridge.save_pretrained(tmp_path)
    assert differing(WeMMUBridge.from_pretrained(tmp_path).state_dict(), bridge.state_dict()) == []
