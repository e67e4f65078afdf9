"""Weights are named by their tensors: not by how they lie in files, nor by what lies beside them."""

import copy
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import SanaTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from wemmu.checkpoint.manifest import read_manifest
from wemmu.config.schema import Backbones
from wemmu.published.identity import hash_files, identity, is_same
from wemmu.published.layout import BackboneError, header

SHAPES = Path(__file__).parents[2] / "assets/shapes"
FILES = {"vlm": "model.safetensors", "sana/transformer": "diffusion_pytorch_model.safetensors"}


@pytest.fixture(params=FILES)
def model(request: pytest.FixtureRequest, backbones: Backbones, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of a backbone's directory, and its weight file."""
    shutil.copytree(backbones.vlm.parent / request.param, tmp_path / "copy")
    return tmp_path / "copy", tmp_path / "copy" / FILES[request.param]


def reshard(directory: Path, file: Path) -> None:
    of_vlm = directory / "tokenizer.json"
    cls = Qwen2_5_VLForConditionalGeneration if of_vlm.exists() else SanaTransformer2DModel
    loaded = cls.from_pretrained(directory)
    file.unlink()
    loaded.save_pretrained(directory, max_shard_size="2MB")
    assert len(list(directory.glob("*-of-*.safetensors"))) > 2


def test_what_is_not_loaded_and_how_it_is_sharded_change_nothing(model: tuple[Path, Path]):
    directory, file = model
    before, old = identity(directory), hash_files(directory)
    half = {name: tensor.half() for name, tensor in load_file(file).items()}
    save_file(half, directory / file.name.replace(".safetensors", ".fp16.safetensors"))
    save_file({"adapter": torch.zeros(3)}, directory / "adapter.safetensors")
    assert identity(directory) == before
    # What earlier versions wrote down is still known, though not as they would have found it now.
    assert hash_files(directory) != old
    assert is_same(old, identity(directory))
    assert is_same(hash_files(directory), identity(directory))
    reshard(directory, file)
    assert identity(directory) == before


@pytest.mark.parametrize("change", ["a bit", "a name", "a type", "a shape"])
def test_every_change_of_what_is_loaded_is_another_name(model: tuple[Path, Path], change: str):
    directory, file = model
    before, old = identity(directory), hash_files(directory)
    weights = load_file(file)
    name = sorted(weights)[0]
    tensor = weights.pop(name)
    match change:
        case "a bit":
            tensor.view(torch.uint8).flatten()[-1] ^= 1
        case "a name":
            name += "_"
        case "a type":
            tensor = tensor.view(torch.int32)
        case "a shape":
            tensor = tensor[None]
    save_file(weights | {name: tensor}, file, metadata={"format": "pt"})
    assert identity(directory) != before
    assert not is_same(before, identity(directory))
    assert not is_same(old, identity(directory))


def test_shipped_checkpoints_of_earlier_versions_know_the_shipped_backbones():
    frozen = read_manifest(SHAPES / "stage1").frozen
    folders = {"vlm": SHAPES / "vlm", "vae": SHAPES / "sana/vae", "dit": SHAPES / "sana/transformer"}
    assert frozen.keys() <= folders.keys()
    assert all(is_same(name, identity(folders[part])) for part, name in frozen.items())
    assert not is_same(frozen["vlm"], identity(folders["vae"]))


def test_an_identity_is_a_text_wherever_it_goes(backbones: Backbones):
    one = identity(backbones.vlm)
    for other in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
        assert (other, type(other), other.directory) == (one, type(one), one.directory)
    # A text that came back from a file is enough to be compared with.
    assert is_same(str(one), one)
    assert not is_same("0" * 64, str(one))


def test_a_header_is_read_once_until_its_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "a.safetensors"
    save_file({"one": torch.zeros(2)}, file)
    before = header(file)
    with monkeypatch.context() as closed:
        closed.setattr(Path, "open", None)
        assert header(file) == before
    save_file({"two": torch.zeros(2, 3)}, file)
    assert list(header(file)) == ["two"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_largest_and_smallest_numbers_have_an_identity_and_infinities_only_in_masks(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    (tmp_path / "config.json").write_text("{}")
    file, found = tmp_path / "model.safetensors", torch.finfo(dtype)
    fine = torch.tensor([found.max, found.min, found.tiny, -0.0], dtype=dtype)
    masked = torch.tensor([-float("inf"), 0.0], dtype=dtype)
    save_file({"up.weight": fine, "attention_mask": masked, "ids": torch.tensor([-1, 2**62])}, file)
    assert identity(tmp_path)
    for value in (float("inf"), -float("inf"), float("nan")):
        save_file({"up.weight": fine, "down.weight": fine.index_fill(0, torch.tensor([1]), value)}, file)
        with pytest.raises(BackboneError, match=r"model\.safetensors: down\.weight holds NaN or infinity"):
            identity(tmp_path)
