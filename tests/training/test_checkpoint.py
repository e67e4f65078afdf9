"""Checkpoints: exact, whole or not there, and never trusted when they are damaged."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from wemmu.parallel.engine import TrainState
from wemmu.training import checkpoint
from wemmu.training.build import start_from
from wemmu.training.checkpoint import CheckpointError

FROZEN = {"vlm": "a" * 64, "vae": "b" * 64, "dit": "c" * 64}
TRAINED = ("bridge.table", "bridge.linear.weight", "bridge.linear.bias")


def make_state(step: int) -> TrainState:
    g = torch.Generator().manual_seed(step)
    shapes = {"bridge.table": (3, 3, 4), "bridge.linear.weight": (2, 4), "bridge.linear.bias": (2,)}
    parts = [{name: torch.randn(shape, generator=g) for name, shape in shapes.items()} for _ in range(3)]
    return TrainState(*parts, step)


def save(root: Path, step: int = 4, carried: dict[str, Tensor] | None = None, frozen: dict[str, str] = FROZEN) -> Path:
    return checkpoint.save(root, make_state(step), carried or {}, stage="stage1", seed=7, resolution=32, frozen=frozen)


def make_model(*extra: str) -> nn.Module:
    """A stand-in with the canonical names: a frozen VLM, the bridge of `make_state`, and a DiT."""
    bridge = nn.ModuleDict({"linear": nn.Linear(4, 2), **{name: nn.Linear(1, 1) for name in extra}})
    bridge.register_parameter("table", nn.Parameter(torch.zeros(3, 3, 4)))
    return nn.ModuleDict({"vlm": nn.Linear(1, 1), "bridge": bridge, "dit": nn.Linear(2, 2)})


def dit_weights() -> dict[str, Tensor]:
    return {"dit.weight": torch.full((2, 2), 5.0), "dit.bias": torch.full((2,), 6.0)}


def files_of(directory: Path) -> list[Path]:
    return sorted(f for f in directory.rglob("*") if f.is_file() and f.name != "manifest.json")


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def test_what_is_loaded_is_what_was_saved_bit_for_bit(tmp_path: Path):
    state, manifest = checkpoint.load_state(save(tmp_path))
    saved = make_state(4)
    assert (state.steps, manifest.step, manifest.seed, manifest.stage, manifest.resolution) == (4, 4, 7, "stage1", 32)
    for part in ("weights", "exp_avg", "exp_avg_sq"):
        ours, theirs = getattr(state, part), getattr(saved, part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), part


def test_the_manifest_lists_every_file_and_every_tensor(tmp_path: Path):
    directory = save(tmp_path, carried=dit_weights())
    manifest = json.loads((directory / "manifest.json").read_text())
    assert {directory / name for name in manifest["files"]} == set(files_of(directory))
    shapes = {n: list(w.shape) for n, w in (make_state(4).weights | dit_weights()).items()}
    assert manifest["tensors"] == shapes
    assert manifest["trained"] == sorted(TRAINED)
    assert manifest["frozen"] == FROZEN
    assert {"python", "torch", "transformers", "diffusers"} <= manifest["libraries"].keys()


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        pytest.param(flip_a_byte, "damaged", id="flipped byte"),
        pytest.param(truncate, "damaged", id="truncated"),
        pytest.param(Path.unlink, "missing", id="missing"),
    ],
)
def test_damage_to_any_file_is_found_and_names_the_file(tmp_path: Path, damage, word: str):
    whole = save(tmp_path / "whole")
    for file in files_of(whole):
        copy = tmp_path / "copy"
        shutil.copytree(whole, copy)
        damage(copy / file.relative_to(whole))
        for read in (checkpoint.verify, checkpoint.load_state, checkpoint.load_weights):
            with pytest.raises(CheckpointError, match=rf"copy: the file {file.relative_to(whole)} is {word}"):
                read(copy)
        shutil.rmtree(copy)


@pytest.mark.parametrize("content", [None, "", '{"format": 1}', "[]"], ids=["none", "empty", "half", "list"])
def test_a_directory_without_a_readable_manifest_is_no_checkpoint(tmp_path: Path, content: str | None):
    directory = save(tmp_path)
    (directory / "manifest.json").unlink()
    if content is not None:
        (directory / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        checkpoint.verify(directory)


def test_another_format_is_refused_by_its_number(tmp_path: Path):
    file = save(tmp_path) / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.verify(file.parent)


def test_the_newest_whole_checkpoint_is_taken_and_debris_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture):
    save(tmp_path, 2)
    middle, newest = save(tmp_path, 10), save(tmp_path, 100)
    assert checkpoint.latest(tmp_path) == newest
    truncate(files_of(newest)[0])
    debris = tmp_path / "step_00000200.tmp"
    shutil.copytree(middle, debris)
    assert checkpoint.latest(tmp_path) == middle
    assert debris.exists()
    checkpoint.clear_debris(tmp_path)
    assert not debris.exists()
    assert f"passing over a checkpoint: {newest}" in capsys.readouterr().out


def test_an_empty_folder_has_no_latest(tmp_path: Path):
    assert checkpoint.latest(tmp_path) is None


def test_a_damaged_checkpoint_is_written_again_whole(tmp_path: Path):
    directory = save(tmp_path)
    flip_a_byte(files_of(directory)[0])
    assert save(tmp_path) == directory
    checkpoint.verify(directory)


def test_prune_keeps_the_newest(tmp_path: Path):
    directories = [save(tmp_path, step) for step in (1, 2, 3, 10)]
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(tmp_path.iterdir()) == directories[2:]


def test_prune_removes_nothing_while_the_newest_is_damaged(tmp_path: Path):
    directories = [save(tmp_path, step) for step in (1, 2, 3)]
    flip_a_byte(files_of(directories[-1])[0])
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.prune(tmp_path, keep=1)
    assert sorted(tmp_path.iterdir()) == directories


def test_shipped_weights_are_all_weights_without_moments(tmp_path: Path):
    directory = save(tmp_path / "run", carried=dit_weights())
    checkpoint.ship(directory, tmp_path / "out", torch.float32)
    weights, manifest = checkpoint.load_weights(tmp_path / "out")
    expected = make_state(4).weights | dit_weights()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert (manifest.step, manifest.frozen, manifest.trained) == (4, FROZEN, [])
    flip_a_byte(tmp_path / "out" / checkpoint.SHIPPED)
    with pytest.raises(CheckpointError, match=checkpoint.SHIPPED):
        checkpoint.load_weights(tmp_path / "out")


def test_shipped_weights_are_rounded_only_to_the_type_asked_for(tmp_path: Path):
    checkpoint.ship(save(tmp_path / "run"), tmp_path / "out")
    for name, weight in checkpoint.load_weights(tmp_path / "out")[0].items():
        assert torch.equal(weight, make_state(4).weights[name].half().float())


def test_a_stage_starts_from_trained_and_carried_weights(tmp_path: Path):
    trained_dit = {"vlm": FROZEN["vlm"], "vae": FROZEN["vae"]}
    model = make_model()
    started = start_from(model, save(tmp_path, carried=dit_weights(), frozen=trained_dit), FROZEN)
    expected = make_state(4).weights | dit_weights()
    assert started == expected.keys()
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in expected.items())


def test_a_stage_starts_from_a_bridge_whose_dit_was_frozen(tmp_path: Path):
    model = make_model()
    before = model["dit"].weight.clone()
    assert start_from(model, save(tmp_path), FROZEN) == set(TRAINED)
    assert torch.equal(model["dit"].weight, before)


@pytest.mark.parametrize("part", FROZEN)
def test_another_frozen_backbone_is_refused(tmp_path: Path, part: str):
    with pytest.raises(CheckpointError, match=f"trained beside another {part}"):
        start_from(make_model(), save(tmp_path), FROZEN | {part: "f" * 64})


def test_a_missing_tensor_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"lacks bridge\.queries\.bias, bridge\.queries\.weight"):
        start_from(make_model("queries"), save(tmp_path), FROZEN)


def test_an_unknown_tensor_is_named(tmp_path: Path):
    source = save(tmp_path, carried={"bridge.vae_branch.linear.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"unknown bridge\.vae_branch\.linear\.weight"):
        start_from(make_model(), source, FROZEN)


def test_a_dit_that_was_trained_but_is_absent_is_refused(tmp_path: Path):
    source = save(tmp_path, frozen={"vlm": FROZEN["vlm"], "vae": FROZEN["vae"]})
    with pytest.raises(CheckpointError, match=r"lacks dit\.bias, dit\.weight"):
        start_from(make_model(), source, FROZEN)


def test_a_tensor_of_another_shape_is_named_and_nothing_is_loaded(tmp_path: Path):
    state = make_state(4)
    weights = state.weights | {"bridge.linear.bias": torch.zeros(3)}
    odd = replace(state, weights=weights)
    source = checkpoint.save(tmp_path, odd, {}, stage="s", seed=0, resolution=32, frozen=FROZEN)
    model = make_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(CheckpointError, match=r"bridge\.linear\.bias has shape \[3\], not \[2\]"):
        start_from(model, source, FROZEN)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
