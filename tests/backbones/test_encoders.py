"""Image encoders: what the published classes and processors compute, from published folders, behind one interface."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoImageProcessor,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from tools.pretraining.encoders import CHANGES, separation
from wemmu.backbones.encoders import cosine, load_encoder
from wemmu.pixels import to_pixels
from wemmu.published.layout import BackboneError

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "do_normalize": True}
# As published: CLIP's is of the first generation, DINOv3's has no crop.
PROCESSORS: dict[str, dict[str, Any]] = {
    "clip": {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32, "resample": 3}
    | {"do_center_crop": True, "do_resize": True, "do_normalize": True}
    | {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]},
    "dinov2": {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 36}, "resample": 3, **IMAGENET}
    | {"crop_size": {"height": 32, "width": 32}, "do_center_crop": True, "do_resize": True, "do_rescale": True},
    "dinov3": {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 32, "width": 32}, **IMAGENET}
    | {"resample": 2, "do_center_crop": None, "crop_size": None, "do_resize": True, "do_rescale": True},
}
PROCESSORS["registers"] = PROCESSORS["dinov2"]


def _model(kind: str) -> Any:
    torch.manual_seed(3)
    if kind == "clip":
        text = SMALL | {"vocab_size": 50, "intermediate_size": 32, "max_position_embeddings": 8, "eos_token_id": 1}
        # As published: the vision tower's copy of the projection's width is wrong.
        vision = SMALL | {"image_size": 32, "intermediate_size": 64, "projection_dim": 512}
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    if kind == "dinov2":
        return Dinov2Model(Dinov2Config(**SMALL, image_size=32))
    if kind == "registers":
        return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, image_size=32, num_register_tokens=4))
    return DINOv3ViTModel(DINOv3ViTConfig(**SMALL, intermediate_size=64, image_size=32, num_register_tokens=4))


def make_folder(kind: str, folder: Path) -> Path:
    """Write a small model of a kind as its authors publish it."""
    model = _model(kind).eval()
    model.save_pretrained(folder)
    if kind == "clip":
        file = folder / "model.safetensors"
        constant = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
        save_file(load_file(file) | constant, file, metadata={"format": "pt"})
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[kind]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    return {kind: make_folder(kind, root / kind) for kind in PROCESSORS}


def _photo(width: int = 90, height: int = 60, seed: int = 0) -> Image.Image:
    noise = torch.rand(3, 6, 9, generator=torch.Generator().manual_seed(seed))
    smooth = nn.functional.interpolate(noise[None], (height, width), mode="bilinear")[0]
    return Image.fromarray((smooth * 255).to(torch.uint8).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("kind", PROCESSORS)
@torch.no_grad()
def test_embedding_and_patches_are_those_of_the_published_class_and_processor(
    kind: str, folders: dict[str, Path]
) -> None:
    encoder, photo = load_encoder(folders[kind]), _photo()
    images = (to_pixels([photo]) + 1) / 2
    # The slow processor of the publication, where there is one, resizes with Pillow, to other last bits.
    published = AutoImageProcessor.from_pretrained(folders[kind], use_fast=kind == "dinov3")
    pixels = published(images=photo, return_tensors="pt")["pixel_values"]
    model = _model(kind).eval()
    if kind == "clip":
        found = model.get_image_features(pixels)
        # transformers 5 returns an object.
        embedding = found if isinstance(found, torch.Tensor) else found.pooler_output
        tokens = model.vision_model(pixels).last_hidden_state[:, 1:]
    else:
        states = model(pixels).last_hidden_state
        embedding, tokens = states[:, 0], states[:, -16:]
    assert (encoder.preprocess(images) - pixels).abs().max() < 0.03
    torch.testing.assert_close(encoder.embed(images), embedding, atol=0.02, rtol=0)
    assert cosine(encoder.embed(images), embedding) > 0.9999
    found = encoder.patches(images)
    assert found.shape == (1, 32, 4, 4)
    torch.testing.assert_close(found[0, :, 1, 2], tokens[0, 1 * 4 + 2], atol=0.03, rtol=0)


@pytest.mark.parametrize("kind", PROCESSORS)
def test_gradients_reach_the_image_but_no_weight(kind: str, folders: dict[str, Path]) -> None:
    encoder = load_encoder(folders[kind]).train()
    images = ((to_pixels([_photo(seed=1), _photo(seed=2)]) + 1) / 2).requires_grad_()
    target = encoder.embed(images.detach().flip(0))
    assert not target.requires_grad
    loss = (1 - cosine(encoder.embed(images), target)).mean()
    loss.backward()
    assert images.grad is not None
    assert all(image.any() for image in images.grad)
    assert all(p.grad is None and not p.requires_grad for p in encoder.parameters())
    assert not encoder.model.training
    # A short step against the gradient lowers the loss as much as the gradient says.
    norm, length = images.grad.norm(), 0.02
    nearer = (images.detach() - length * images.grad / norm).requires_grad_()
    gained = loss - (1 - cosine(encoder.embed(nearer), target)).mean()
    assert (gained / (length * norm)).item() == pytest.approx(1, abs=0.25)
    # Resized as floats, not as bytes: nearly the same embedding.
    assert (cosine(encoder.embed(images), encoder.embed(images.detach())) > 0.999).all()


def test_images_of_any_size_come_in_one_list(folders: dict[str, Path]) -> None:
    encoder = load_encoder(folders["clip"], name="a name")
    images = [(to_pixels([_photo(*size)])[0] + 1) / 2 for size in ((90, 60), (40, 40), (33, 70))]
    together = encoder.embed(images)
    apart = torch.cat([encoder.embed(image[None]) for image in images])
    torch.testing.assert_close(together, apart)
    assert encoder.name == "a name"
    assert load_encoder(folders["clip"]).name == "clip"
    torch.testing.assert_close(cosine(together, together), torch.ones(3))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.full((1, 3, 32, 32), 255.0), "255"),
        (-torch.ones(1, 3, 32, 32), "-1"),
        (torch.full((1, 3, 32, 32), float("nan")), "nan"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "uint8"),
        (torch.zeros(3, 32, 32), r"\(3, 32, 32\)"),
        (torch.zeros(1, 1, 32, 32), r"\(1, 1, 32, 32\)"),
        ([], "at least one"),
    ],
)
def test_pixels_outside_of_0_to_1_are_refused(images: Any, words: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=words):
        load_encoder(folders["dinov2"]).embed(images)


def test_an_unknown_architecture_lists_the_known_ones(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}', encoding="utf-8")
    with pytest.raises(BackboneError, match=r"siglip.*CLIPModel.*Dinov2Model.*DINOv3ViTModel.*deit3"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("lacking", ["model.safetensors", "preprocessor_config.json"])
def test_a_folder_that_lacks_a_file_or_holds_only_a_pickle_is_refused(lacking: str, tmp_path: Path) -> None:
    folder = make_folder("clip", tmp_path / "clip")
    (folder / lacking).rename(folder / "pytorch_model.bin")
    with pytest.raises(BackboneError, match=lacking):
        load_encoder(folder)


def test_a_missing_weight_is_an_error_and_nothing_is_random(tmp_path: Path) -> None:
    folder = make_folder("clip", tmp_path / "clip")
    stored = load_file(folder / "model.safetensors")
    del stored["visual_projection.weight"]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"visual_projection\.weight"):
        load_encoder(folder)


def _timm_weights(width: int = 384, depth: int = 2, patch: int = 16, grid: int = 2) -> dict[str, torch.Tensor]:
    """Random weights under timm's names and shapes of a small DeiT III."""
    torch.manual_seed(4)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, grid * grid, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "head.weight": (10, width),
        "head.bias": (10,),
    }
    inner = {"norm1.weight": (width,), "norm1.bias": (width,), "norm2.weight": (width,), "norm2.bias": (width,)}
    inner |= {"attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,), "attn.proj.bias": (width,)}
    inner |= {"attn.proj.weight": (width, width), "ls1.gamma": (width,), "ls2.gamma": (width,)}
    inner |= {"mlp.fc1.weight": (4 * width, width), "mlp.fc1.bias": (4 * width,)}
    inner |= {"mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,)}
    shapes |= {f"blocks.{block}.{name}": shape for block in range(depth) for name, shape in inner.items()}
    return {name: 0.05 * torch.randn(shape) for name, shape in shapes.items()}


def _deit3(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    cfg = {"input_size": [3, 32, 32], "interpolation": "bicubic", "crop_pct": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"architecture": "deit3_small_patch16_224", "num_classes": 10, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def test_deit3_in_the_class_of_dinov2_equals_timms(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    weights = _timm_weights()
    options = {"depth": 2, "img_size": 32, "num_classes": 10}
    reference = timm.create_model("deit3_small_patch16_224", pretrained=False, **options).eval()
    reference.load_state_dict(weights)
    encoder = load_encoder(_deit3(tmp_path / "deit3", weights))
    images = (to_pixels([_photo(32, 32)]) + 1) / 2
    states = reference.forward_features(encoder.preprocess(images))
    torch.testing.assert_close(encoder.embed(images), states[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(encoder.patches(images).flatten(2).mT, states[:, 1:], atol=1e-4, rtol=1e-4)


def test_deit3_is_read_strictly(tmp_path: Path) -> None:
    weights = _timm_weights()
    encoder = load_encoder(_deit3(tmp_path / "deit3", weights))
    assert encoder.patches(torch.rand(2, 3, 40, 50)).shape == (2, 384, 2, 2)
    assert encoder.model.embeddings.position_embeddings[:, 0].eq(0).all()
    for change in ({"blocks.0.ls1.gamma": None}, {"blocks.1.attn.gate.weight": torch.ones(1)}):
        broken = {k: v for k, v in (weights | change).items() if v is not None}
        with pytest.raises(BackboneError, match="does not hold a DeiT III"):
            load_encoder(_deit3(tmp_path / "deit3", broken))


@pytest.mark.parametrize("name", ["clip", "dino"])
def test_the_miniatures_encoders_tell_a_redrawn_scene_from_a_changed_one(name: str) -> None:
    found = separation(load_encoder(Path("assets/shapes/encoders") / name), seed=7, count=40)
    for change in CHANGES:
        assert found[change]["nearer"] >= 0.85, change
    assert found["another scene"]["nearer"] == 1
    assert found["another scene"]["cosine"] < min(found[change]["cosine"] for change in CHANGES)
