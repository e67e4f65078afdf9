"""What transformers 4 and 5 do differently stays in the adapters; `make test-newest` runs this on version 5."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.models.world import make_batch, make_model
from wemmu.backbones.versions import layer_states, portable, rope_theta, vlm_config, with_cache
from wemmu.backbones.vlm import VLM
from wemmu.backbones.weights import load_vlm
from wemmu.config.schema import Backbones
from wemmu.prompts import PromptEncoder
from wemmu.recipes.wemmu.component import WeMMUBridge
from wemmu.recipes.wemmu.config import Bridge, Queries


def rope_of_version(directory: Path, version: int) -> None:
    """Write the rotary settings of a VLM's config.json as a version of transformers does."""
    file = directory / "config.json"
    config = json.loads(file.read_text())
    text = portable(config["text_config"])
    if version == 5:
        text["rope_parameters"] = {"rope_theta": text.pop("rope_theta"), **text.pop("rope_scaling")}
    file.write_text(json.dumps(config | {"text_config": text}))


@torch.no_grad()
def test_a_vlm_saved_by_either_version_is_the_same_model(backbones: Backbones, encoder: PromptEncoder, tmp_path: Path):
    """Of the base of the rotary frequencies nothing but its value in the config tells that it was not read."""
    prefixes = []
    for version in (4, 5):
        directory = tmp_path / str(version)
        shutil.copytree(backbones.vlm, directory)
        rope_of_version(directory, version)
        vlm, _ = load_vlm(directory, torch.float32)
        assert rope_theta(vlm.config.text_config) == rope_theta(vlm_config(type(vlm), directory).text_config) == 100.0
        model = make_model(backbones.model_copy(update={"vlm": directory}))
        batch = make_batch(encoder, [0, 1])
        prefixes.append(model.vlm.prefix(batch.prompts, batch.images))
    for ours, theirs in zip(prefixes[0].keys, prefixes[1].keys, strict=True):
        assert torch.equal(ours, theirs)


def test_a_bridge_is_exported_in_the_form_that_both_versions_read(backbones: Backbones, tmp_path: Path):
    directory = tmp_path / "vlm"
    shutil.copytree(backbones.vlm, directory)
    rope_of_version(directory, 5)
    model = make_model(backbones.model_copy(update={"vlm": directory}))
    WeMMUBridge.of(model, Bridge(position_table=8, queries=Queries(number=9))).save_pretrained(tmp_path / "bridge")
    text = json.loads((tmp_path / "bridge" / "config.json").read_text())["text_config"]
    assert text["rope_theta"] == 100.0
    assert text["rope_scaling"]["mrope_section"] == [2, 4, 10]
    assert "rope_parameters" not in text
    bridge = WeMMUBridge.from_pretrained(tmp_path / "bridge")
    assert torch.equal(bridge.pathway.rotary.inv_freq, model.bridge.pathway.rotary.inv_freq)


@torch.no_grad()
def test_a_layer_keeps_the_batch_and_fills_the_cache_it_is_given(backbones: Backbones, encoder: PromptEncoder):
    """Under transformers 5 a wrong name leaves the cache empty, and `layer(x)[0]` is the first sample."""
    vlm: VLM = make_model(backbones).vlm
    layer, seen = vlm.language_model.layers[0], []

    class Cache:
        def update(self, key: Tensor, value: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
            seen.append(key)
            return key, value

    x, positions = torch.randn(2, 3, 128), torch.zeros(3, 2, 3, dtype=torch.long)
    rotation = vlm.language_model.rotary_emb(x, positions)
    out = layer_states(layer(x, position_embeddings=rotation, **with_cache(layer, Cache())))
    assert out.shape == x.shape
    assert [len(key) for key in seen] == [2]


class Renamed(nn.Module):
    def forward(self, states: Tensor, memory: object = None, **_: object) -> Tensor:
        return states


def test_a_version_with_another_name_for_its_cache_is_refused():
    with pytest.raises(ValueError, match="Renamed of the installed transformers takes its cache neither as `cache` "):
        with_cache(Renamed(), None)
