"""What is no whole backbone is told before anything is loaded, in one sentence, whoever asks."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from diffusers import SanaTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from tests.planning.worlds import MINIATURE, curriculum_with
from wemmu.backbones.weights import load_autoencoder, load_dit, load_vlm
from wemmu.config.schema import Backbones
from wemmu.diagnosis import preflight
from wemmu.planning.ask import PlanError, configs_of
from wemmu.prompts import PromptEncoder
from wemmu.published.check import problems
from wemmu.published.configs import CONFIGS
from wemmu.published.layout import BackboneError
from wemmu.recipes.wemmu.build import build_model
from wemmu.recipes.wemmu.config import Bridge, WeMMU

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3968658944\n"
# transformers 4 writes the first, transformers 5 the second.
IMAGE_SETTINGS = ("preprocessor_config.json", "processor_config.json")
TENSORS = "diffusion_pytorch_model.safetensors"


def change_json(file: Path, **fields: object) -> None:
    content = json.loads(file.read_text())
    content.update(fields)
    file.write_text(json.dumps(content))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def quantize(file: Path) -> None:
    """As int8, without the scales that make numbers of it."""
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(file).items()}, file)


def shard(folder: Path) -> Path:
    """Split the DiT's weights into files with an index; returns the first of them."""
    model = SanaTransformer2DModel.from_pretrained(folder)
    (folder / TENSORS).unlink()
    model.save_pretrained(folder, max_shard_size="2MB")
    return sorted(folder.glob("*-of-*.safetensors"))[0]


def mislabel(folder: Path) -> None:
    index = folder / f"{TENSORS}.index.json"
    shard(folder)
    names = json.loads(index.read_text())["weight_map"]
    files = sorted(set(names.values()))
    change_json(index, weight_map={name: files[0] for name in names})


def retype(file: Path, dtype: torch.dtype) -> None:
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)


def overlap(file: Path) -> None:
    """Give the first tensor the bytes of the second, which has another size."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first, second = [name for name in header if name != "__metadata__"][:2]
    header[first]["data_offsets"] = header[second]["data_offsets"]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def number_shards(folder: Path) -> None:
    shard(folder)
    change_json(folder / f"{TENSORS}.index.json", weight_map={"scale_shift_table": 1})


def give_variant(folder: Path, single: str, variant: str) -> None:
    (folder / single).rename(folder / single.replace(".safetensors", f".{variant}.safetensors"))


# What is done to a copy (its root is given) -> what is said of it.
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "only a bf16 variant": (lambda r: give_variant(r / "vlm", "model.safetensors", "bf16"), "model.bf16.safetensors"),
    "an autoencoder only in fp16": (
        lambda r: give_variant(r / "sana/vae", TENSORS, "fp16"),
        "diffusion_pytorch_model.fp16.safetensors; download the weights without a variant",
    ),
    "no tokenizer": (
        lambda r: [(r / "vlm" / name).unlink() for name in ("tokenizer.json", "vocab.json")],
        "vlm holds no tokenizer: neither tokenizer.json nor vocab.json",
    ),
    "no chat template": (lambda r: (r / "vlm/chat_template.jinja").unlink(), "vlm holds no chat template"),
    "no image processor": (
        lambda r: [(r / "vlm" / name).unlink(missing_ok=True) for name in IMAGE_SETTINGS],
        "preprocessor_config.json is needed",
    ),
    "weights that git-lfs left": (
        lambda r: (r / "vlm/model.safetensors").write_text(POINTER),
        "is a Git LFS pointer",
    ),
    "a tokenizer that git-lfs left": (
        lambda r: (r / "vlm/tokenizer.json").write_text(POINTER),
        "tokenizer.json is a Git LFS poi",
    ),
    "a config that git-lfs left": (
        lambda r: (r / "sana/vae/config.json").write_text(POINTER),
        "config.json is a Git LFS pointer",
    ),
    "a file cut short": (lambda r: cut(r / f"sana/transformer/{TENSORS}"), "an incomplete download"),
    "an empty file": (lambda r: (r / f"sana/vae/{TENSORS}").write_bytes(b""), "is not a safetensors file"),
    "a file of something else": (
        lambda r: (r / f"sana/vae/{TENSORS}").write_bytes(struct.pack("<Q", 4) + b"[1] "),
        "its header is unreadable",
    ),
    "a shard that is not there": (
        lambda r: shard(r / "sana/transformer").unlink(),
        "safetensors.index.json lists: an incomplete downl",
    ),
    "a shard that git-lfs left": (
        lambda r: shard(r / "sana/transformer").write_text(POINTER),
        "is a Git LFS pointer",
    ),
    "an index of other files": (lambda r: mislabel(r / "sana/transformer"), "does not hold"),
    "a Sana-Sprint": (
        lambda r: change_json(r / "sana/transformer/config.json", guidance_embeds=True),
        "has guidance_embeds: a Sana-Sprint",
    ),
    "a FLUX": (
        lambda r: change_json(r / "sana/transformer/config.json", _class_name="FluxTransformer2DModel"),
        "describes FluxTransformer2DModel; valid choices: SanaTransformer2DModel",
    ),
    "another autoencoder": (
        lambda r: change_json(r / "sana/vae/config.json", _class_name="VQModel"),
        "describes VQModel; valid choices: AutoencoderDC",
    ),
    "another VLM": (
        lambda r: change_json(r / "vlm/config.json", model_type="llava", architectures=["Llava"]),
        "describes llava; valid choices: Qwen2_5_VLForConditionalGeneration",
    ),
    "a quantized VLM": (
        lambda r: change_json(r / "vlm/config.json", quantization_config={"bits": 4}),
        "has a quantization_config",
    ),
    "an autoencoder of other channels": (
        lambda r: change_json(r / "sana/vae/config.json", latent_channels=16),
        "transformer takes 32 channels, the autoencoder",
    ),
    "a config in UTF-16": (
        lambda r: (r / "sana/vae/config.json").write_text((r / "sana/vae/config.json").read_text(), "utf-16"),
        "vae/config.json is not JSON",
    ),
    "a page instead of the tokenizer": (lambda r: (r / "vlm/tokenizer.json").write_text("<html>"), "is not JSON"),
    "a page instead of its settings": (
        lambda r: (r / "vlm/tokenizer_config.json").write_text("<html>"),
        "tokenizer_config.json is not JSON",
    ),
    "weights in 8 bits": (lambda r: quantize(r / f"sana/transformer/{TENSORS}"), "as I8: quantized"),
    "weights as whole numbers": (lambda r: retype(r / f"sana/vae/{TENSORS}", torch.int64), "as I64: quantized or br"),
    "tensors that share bytes": (
        lambda r: overlap(r / f"sana/vae/{TENSORS}"),
        "shapes and offsets do not fit; download",
    ),
    "an index of numbers": (lambda r: number_shards(r / "sana/transformer"), "index.json has no weight_map"),
    "a list of classes": (
        lambda r: change_json(r / "sana/vae/config.json", _class_name=["AutoencoderDC"]),
        "describes no class of a model; valid choices: AutoencoderDC",
    ),
    "a config of a million brackets": (
        lambda r: (r / "sana/vae/config.json").write_text('{"a":' * 10**6 + "1" + "}" * 10**6),
        "vae/config.json is not JSON",
    ),
    "no channels": (
        lambda r: change_json(r / "sana/vae/config.json", latent_channels=None),
        "vae/config.json int() argument",
    ),
    **{
        f"latents scaled by {value}": (
            lambda r, value=value: change_json(r / "sana/vae/config.json", scaling_factor=value),
            f"scaling_factor is {value}; latents are divided by it, so it must be above 0",
        )
        for value in (0, None, -1.0, "0.4", float("nan"))
    },
    "a VLM without sizes": (lambda r: change_json(r / "vlm/config.json", text_config=None), "has no text_config"),
    "a VLM without eyes": (lambda r: change_json(r / "vlm/config.json", vision_config={}), "has no vision_config"),
    **{
        f"{value} as {field} of the {part}": (
            lambda r, part=part, field=field, value=value: change_json(r / part / "config.json", **{field: value}),
            f"config.json: {field} is {value}, and no known model has more than 1000",
        )
        for part, field, value in (
            ("sana/transformer", "num_layers", 10**6),
            ("sana/transformer", "num_attention_heads", 10**6),
            ("sana/transformer", "sample_size", 10**9),
            ("sana/vae", "encoder_layers_per_block", [2, 10**6]),
        )
    },
    "no folder": (lambda r: shutil.rmtree(r / "sana/vae"), "sana/vae is not a directory"),
    "pickles": (
        lambda r: (r / f"sana/vae/{TENSORS}").rename(r / "sana/vae/diffusion_pytorch_model.bin"),
        "which can run code when it is read",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_whole_backbone_is_told_before_it_is_loaded(copied: Backbones, tmp_path: Path, what: str):
    damage, told = BROKEN[what]
    damage(tmp_path)
    found = preflight.backbones(curriculum_with(MINIATURE, copied))
    assert found.status == "problem"
    assert told in found.found
    # The loader says the same, and nothing was loaded that it could have failed with.
    with pytest.raises(BackboneError) as refusal:
        build_model(copied, Bridge(), 0)
    assert str(refusal.value) == found.found


@pytest.mark.parametrize(
    ("kind", "field", "value", "error"),
    [
        ("vae", "latent_channels", "32", "TypeError"),
        ("vae", "encoder_block_types", [], "IndexError"),
        ("transformer", "num_layers", "32", "TypeError"),
        ("transformer", "patch_size", 0, "ZeroDivisionError"),
    ],
)
def test_a_config_that_describes_no_model_is_named(
    copied: Backbones, tmp_path: Path, kind: str, field: str, value: object, error: str
):
    """Nothing can check every field; what the library makes of it is said with the folder."""
    change_json(tmp_path / "sana" / kind / "config.json", **{field: value})
    load = load_autoencoder if kind == "vae" else load_dit
    with pytest.raises(BackboneError, match=f"sana/{kind} cannot be loaded as .*: {error}"):
        load(tmp_path / "sana" / kind, torch.float32)


def test_a_vlm_of_other_sizes_is_refused_before_it_is_built(copied: Backbones):
    """transformers would fill it at random first: for a size that is not given, with billions of numbers."""
    config = json.loads((copied.vlm / "config.json").read_text())
    del config["text_config"]["hidden_size"]
    change_json(copied.vlm / "config.json", **config)
    with pytest.raises(BackboneError, match="does not have exactly the tensors of its config"):
        load_vlm(copied.vlm, torch.float32)


def test_a_whole_pipeline_is_no_part_of_one(copied: Backbones):
    (copied.dit.parent / "model_index.json").write_text("{}")
    wrong = Backbones(vlm=copied.vlm, dit=copied.dit.parent, vae=copied.vae)
    (found,) = problems(wrong, WeMMU.backbones)
    assert found.endswith("sana is a whole pipeline; name the dit in it, one of its folders transformer, vae")


def cut_in_half(file: Path) -> None:
    file.write_text(file.read_text()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda vlm: cut_in_half(vlm / "tokenizer.json"), "cannot write a prompt: "),
        (lambda vlm: cut_in_half(vlm / "chat_template.jinja"), "cannot write a prompt: TemplateSyntaxError"),
        (lambda vlm: (vlm / "chat_template.jinja").write_text("<html>404</html>"), "cannot write a prompt"),
        (lambda vlm: change_json(vlm / "config.json", image_token_id=7), r"has the image_token_id 7, but <\|image_pad"),
    ],
)
def test_files_that_write_no_prompts_of_this_vlm_are_named(
    copied: Backbones, damage: Callable[[Path], object], told: str
):
    """With another id no token of a prompt would be an image, and the VLM would see none."""
    damage(copied.vlm)
    with pytest.raises(BackboneError, match=told):
        PromptEncoder(copied.vlm)


def test_a_whole_backbone_is_none_of_these(copied: Backbones):
    assert problems(copied, WeMMU.backbones) == []
    shard(copied.dit)
    (copied.vlm / "vocab.json").unlink()
    (copied.vlm / "model.fp16.safetensors").write_text(POINTER)
    assert problems(copied, WeMMU.backbones) == []
    assert preflight.backbones(curriculum_with(MINIATURE, copied)).status == "ok"


def test_the_files_that_are_asked_for_are_those_that_make_prompts(copied: Backbones):
    """Without each of them the processor itself fails, but for a template that is also elsewhere."""
    template = (copied.vlm / "chat_template.jinja").read_text()
    (copied.vlm / "chat_template.jinja").unlink()
    change_json(copied.vlm / "tokenizer_config.json", chat_template=template)
    processor = AutoProcessor.from_pretrained(copied.vlm, use_fast=True)
    with pytest.raises(ValueError, match="does not have a chat template"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": "?"}]}])
    assert "no chat template" in problems(copied, WeMMU.backbones)[0]
    (copied.vlm / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert problems(copied, WeMMU.backbones) == []
    assert AutoProcessor.from_pretrained(copied.vlm, use_fast=True).chat_template == template


def test_a_run_that_uses_no_dit_needs_none(copied: Backbones):
    shutil.rmtree(copied.dit)
    ross = curriculum_with(MINIATURE.parent / "ross.yaml", copied)
    assert preflight.backbones(ross).status == "ok"
    assert preflight.backbones(curriculum_with(MINIATURE, copied)).status == "problem"


def test_a_config_of_another_model_is_not_planned_with(copied: Backbones):
    change_json(copied.dit / "config.json", _class_name="FluxTransformer2DModel")
    run = curriculum_with(MINIATURE, copied).stage_run("stage1")
    with pytest.raises(
        PlanError, match=r"transformer/config\.json describes FluxTrans.*valid choices: SanaTransformer2DModel"
    ):
        configs_of(run)
    change_json(copied.dit / "config.json", _class_name=None)
    with pytest.raises(PlanError, match="describes no class of a model"):
        configs_of(run)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen2.5-VL-7B-Instruct", 8_292_166_656),
        ("Qwen3-VL-2B-Instruct", 2_127_532_032),
        ("Qwen3-VL-4B-Instruct", 4_437_815_808),
        ("Sana_600M_1024px_diffusers/transformer", 591_747_872),
        ("SANA1.5_1.6B_1024px_diffusers/transformer", 1_604_641_952),
        ("SANA1.5_4.8B_1024px_diffusers/transformer", 4_721_825_952),
        ("dc-ae-f32c32-sana-1.1-diffusers", 312_250_275),
        ("clip-vit-large-patch14", 303_966_208),
        ("dinov2-large", 304_368_640),
    ],
)
def test_configs_known_by_name_are_of_models_of_the_published_size(name: str, parameters: int):
    """The VLMs' counts are the published ones; of the others none was found in print, so these guard the configs."""
    config = CONFIGS[name]
    cls = getattr(transformers, config["architectures"][0]) if "architectures" in config else None
    with torch.device("meta"):
        if cls is not None:
            model = cls(cls.config_class(**config))
        else:
            model = getattr(diffusers, config["_class_name"]).from_config(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
