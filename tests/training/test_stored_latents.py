"""Stored latents stand in for encoding: the losses are the same, and those of another autoencoder are refused."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data import handmade
from tests.data.handmade import Record, pixels, shapes, stream
from tests.training.runs import make_run
from wemmu.backbones.vae import FrozenVAE
from wemmu.config.schema import Backbones, StageRun
from wemmu.config.shards import LatentSettings, ShardError
from wemmu.config.task import GENERATION_TASKS, Task
from wemmu.published.identity import identity
from wemmu.training.build import StageParts, build

# Reconstruction and unconditional generation are made of the text-to-image records.
STORED = (Task.T2I, Task.EDIT, Task.MULTI_EDIT)
MIXTURE = {task.value: 1.0 for task in GENERATION_TASKS}


@pytest.fixture(scope="module")
def vae(model) -> FrozenVAE:
    return model.vae


def latent_settings(
    encoder: FrozenVAE, backbones: Backbones, size: tuple[int, int], **changes: object
) -> LatentSettings:
    found = {
        "vae": identity(backbones.vae),
        "scaling_factor": encoder.scaling_factor,
        "dtype": "float32",
        "channels": encoder.latent_channels,
        "rows": size[0] // encoder.latent_px,
        "columns": size[1] // encoder.latent_px,
    }
    return LatentSettings.model_validate(found | changes)


def encoded(records: Sequence[Record], vae: FrozenVAE, kind: LatentSettings) -> list[Record]:
    """The records with latents of all their images."""

    def latents(record: Record) -> tuple[bytes, ...]:
        encoded = np.stack([pixels(p) for p in (record.target, *record.images) if p is not None])
        made = vae.encode(torch.from_numpy(encoded)).to(getattr(torch, kind.dtype)).contiguous()
        return tuple(row.view(torch.uint8).numpy().tobytes() for row in made)

    return [Record(r.id, r.prompt, r.images, r.target, latents(r)) for r in records]


def write(root: Path, encoder: FrozenVAE | None, backbones: Backbones, size: tuple[int, int] = (32, 32), **changes):
    """A data set with the latents that `encoder` makes; `changes` are fields in which their description lies."""
    streams = {}
    for task in STORED:
        records, kind = shapes(task, 8, size), None
        if encoder is not None:
            kind = latent_settings(encoder, backbones, size, **changes)
            records = encoded(records, encoder, kind)
        streams[stream(task, *size, latents=kind)] = records
    handmade.write(root, streams)


def stage(backbones: Backbones, shards: Path) -> StageRun:
    mixture = {Task(task): weight for task, weight in MIXTURE.items()}
    return make_run(backbones, shards).changed({"stage.mixture": mixture, "stage.steps": 10, "memory.cached_images": 0})


def losses(parts: StageParts) -> dict[tuple[Task, int], torch.Tensor]:
    """Of each micro-batch of ten steps, which hold every task."""
    return {
        (batch.task, step): parts.engine.accumulate([batch], step)[0].values
        for step in range(10)
        for batch in parts.loader.micro_batches(step)
    }


class Encodings:
    """How often the autoencoder encodes images, and how many."""

    def __init__(self, vae: FrozenVAE, monkeypatch: pytest.MonkeyPatch):
        self.encoded = 0
        real = vae.encode

        def encode(pixels: torch.Tensor, *grid: object) -> torch.Tensor:
            self.encoded += len(pixels)
            return real(pixels, *grid)

        monkeypatch.setattr(vae, "encode", encode)


@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_losses_with_stored_latents_are_those_without(
    vae: FrozenVAE, backbones: Backbones, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
):
    write(tmp_path / "pixels", None, backbones, size)
    write(tmp_path / "latents", vae, backbones, size)
    plain, stored = (build(stage(backbones, tmp_path / name)) for name in ("pixels", "latents"))
    counts = [Encodings(parts.recipe.vae, monkeypatch) for parts in (plain, stored)]
    without, with_latents = losses(plain), losses(stored)
    assert {task for task, _ in without} == set(GENERATION_TASKS)
    assert without.keys() == with_latents.keys()
    for key, values in without.items():
        torch.testing.assert_close(with_latents[key], values, rtol=0, atol=1e-6)
    # The tokens of the miniature are as large as its latents, so nothing at all is left to encode.
    assert [count.encoded for count in counts] == [counts[0].encoded, 0]
    assert counts[0].encoded > 10 * 4


def test_stored_latents_and_not_the_images_are_what_is_learnt(
    vae: FrozenVAE, backbones: Backbones, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Latents of brighter images than those beside them give other losses."""
    write(tmp_path / "right", vae, backbones)
    real = vae.encode
    monkeypatch.setattr(vae, "encode", lambda p: real(p // 2 + 100))
    write(tmp_path / "wrong", vae, backbones)
    right, wrong = (losses(build(stage(backbones, tmp_path / name))) for name in ("right", "wrong"))
    assert all((right[key] - wrong[key]).abs().min() > 1e-4 for key in right)


def test_bfloat16_latents_are_cast_to_the_type_of_the_model(vae: FrozenVAE, backbones: Backbones, tmp_path: Path):
    write(tmp_path / "pixels", None, backbones)
    write(tmp_path / "latents", vae, backbones, dtype="bfloat16")
    exact, rounded = (losses(build(stage(backbones, tmp_path / name))) for name in ("pixels", "latents"))
    for key, values in exact.items():
        assert rounded[key].dtype == values.dtype
        torch.testing.assert_close(rounded[key], values, rtol=0.05, atol=0.05)
        assert not torch.equal(rounded[key], values)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vae": "f" * 64}, "vae: f{64} stored, tensors:[0-9a-f]{64} here"),
        ({"scaling_factor": 0.25}, "scaling_factor: 0.25 stored, 0.5 here"),
        ({"rows": 1, "columns": 4}, r"rows: 1 stored, 2\.0 here; columns: 4 stored, 2\.0 here"),
        ({"channels": 7}, "channels: 7 stored, 32 here"),
    ],
)
def test_latents_of_another_autoencoder_are_refused_with_both_values(
    vae: FrozenVAE, backbones: Backbones, tmp_path: Path, changes: dict, words: str
):
    write(tmp_path, vae, backbones, **changes)
    with pytest.raises(ShardError, match=rf"latents stored in t2i/32/32x32 are not of this .*\({words}\)"):
        build(stage(backbones, tmp_path))


def test_inputs_on_another_grid_than_their_tokens_are_encoded_from_pixels(model, monkeypatch: pytest.MonkeyPatch):
    """As at the published sizes, where tokens have 28 px and latents 32."""
    images = torch.randint(0, 256, (2, 1, 3, 64, 64), dtype=torch.uint8)
    own = 64 // model.vae.latent_px
    stored = model.vae.encode(images.flatten(0, 1)).unflatten(0, (2, 1))
    assert torch.equal(model.input_latents(images, stored), stored)
    assert torch.equal(model.input_latents(images, torch.zeros_like(stored)), torch.zeros_like(stored))
    monkeypatch.setattr(model.vlm, "token_px", model.vlm.token_px // 2)
    smaller = model.input_latents(images, stored)
    assert smaller.shape[-2:] == (2 * own, 2 * own)
    assert torch.equal(smaller, model.input_latents(images))
