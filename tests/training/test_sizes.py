"""Inputs and output of an edit may differ in size and shape, in a data set, a batch, the model and a request."""

import json

import pytest
import torch
from PIL import Image

from tests.data_pipeline.worlds import curriculum_of, write_in_process
from tests.models.world import random_images
from tests.training.runs import make_run
from wemmu.config import Task
from wemmu.config.buckets import RequestSizes
from wemmu.config.schema import Backbones, StageRun
from wemmu.data.collate import collate
from wemmu.evaluation.fidelity.measures import pixel_shift
from wemmu.pixels import by_size, fitted, on_canvas
from wemmu.positions import token_grid
from wemmu.recipes.wemmu.loss import FlowMatchingLoss
from wemmu.recipes.wemmu.model import WeMMU
from wemmu.training.build import StageParts, build

# (height, width) of the input images and of the target, px. At 64 px and in steps of 16 px their buckets
# have 16 or 15 tokens.
SQUARE, WIDE, TALL, LONG = (80, 80), (60, 100), (100, 60), (250, 64)
RECORDS = [
    ([SQUARE], SQUARE),
    ([SQUARE], (84, 86)),
    ([WIDE], SQUARE),
    ([LONG], SQUARE),
    ([SQUARE], WIDE),
    ([WIDE, SQUARE], SQUARE),
    ([TALL, WIDE], SQUARE),
]
# Of images on a canvas.
SHAPES = [[(32, 48), (16, 16)], [(16, 32), (16, 16)]]
EXPECTED = {"edit/64/64x64": 2, "edit/64/64x64-mixed": 2, "edit/64/48x80-mixed": 1, "multi_edit/64/64x64x2-mixed": 2}


def image(seed: int, height: int, width: int) -> Image.Image:
    coarse = random_images(seed, height // 8, width // 8, 3).numpy()
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def mixed_run(backbones: Backbones, tmp_path_factory: pytest.TempPathFactory) -> StageRun:
    """A stage over an edit set of many sizes, as `wemmu data write` stores it."""
    root = tmp_path_factory.mktemp("edits")
    lines = []
    for number, (inputs, target) in enumerate(RECORDS):
        names = [f"{number}-{n}.png" for n in range(len(inputs))]
        for n, (name, size) in enumerate(zip([*names, f"{number}.png"], [*inputs, target], strict=True)):
            image(10 * number + n, *size).save(root / name)
        lines.append({"instruction": f"edit {number}", "input": names, "target": f"{number}.png"})
    (root / "edits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"kind": "edits", "name": "edits", "path": str(root / "edits.jsonl")}
    mixture = {"edit": 0.5, "multi_edit": 0.5}
    images = {"unit": 16, "max_aspect": 4.0, "format": "png"}
    curriculum = curriculum_of(root / "shards", [source], images=images, mixture=mixture)
    streams = {stream.settings.name: stream.samples for stream in write_in_process(curriculum).streams}
    assert {name: n for name, n in streams.items() if "/64/" in name} == EXPECTED
    tasks = {Task(task): weight for task, weight in mixture.items()}
    return make_run(backbones, root / "shards").changed(
        {"stage.mixture": tasks, "stage.resolution": 64, "stage.steps": 20}
    )


@pytest.fixture(scope="module")
def parts(mixed_run: StageRun) -> StageParts:
    return build(mixed_run)


@pytest.mark.parametrize("name", ["edit/64/64x64-mixed", "multi_edit/64/64x64x2-mixed"])
def test_a_sample_among_others_of_other_sizes_learns_what_it_learns_alone(parts: StageParts, name: str):
    made, loader = parts.recipe, parts.loader
    stream = next(s for s in loader._streams if s.settings.name == name)
    samples = [stream[index] for index in range(2)]
    assert isinstance(made.loss, FlowMatchingLoss)

    def learnt(chosen: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = collate(stream.settings, [samples[i] for i in chosen], made.encoder, made.token_px)
        assert len(set(batch.prompts.image_tokens)) == len(chosen), "they have as many tokens, which proves less"
        values = made.loss(batch, 3).values
        return values, torch.autograd.grad(values.sum(), [p for p in made.model.parameters() if p.requires_grad])

    together, gradients = learnt([0, 1])
    (first, of_first), (second, of_second) = learnt([0]), learnt([1])
    torch.testing.assert_close(together, torch.cat([first, second]), rtol=1e-4, atol=1e-5)
    for both, one, other in zip(gradients, of_first, of_second, strict=True):
        torch.testing.assert_close(both, one + other, rtol=1e-3, atol=1e-4)


def test_a_canvas_gives_back_every_image_and_nothing_of_its_margin():
    samples = [[random_images(10 * b + n, 3, *s) for n, s in enumerate(row)] for b, row in enumerate(SHAPES)]
    canvas, sizes = on_canvas(samples, (8, 8))
    assert canvas.shape == (2, 2, 3, 32, 48)
    found = {
        place: image for places, images in by_size(canvas, sizes) for place, image in zip(places, images, strict=True)
    }
    assert all(torch.equal(found[2 * b + n], image) for b, row in enumerate(samples) for n, image in enumerate(row))
    assert on_canvas([[], []], (8, 8))[0].shape == (2, 0, 3, 8, 8)


@torch.no_grad()
def test_images_of_other_sizes_give_the_vlm_and_the_vae_branch_what_each_gives_alone(parts: StageParts):
    """One after the other: tokens and latents of a prompt in the order of its images."""
    model, encoder = parts.recipe.model, parts.recipe.encoder
    assert isinstance(model, WeMMU)
    samples = [[random_images(10 * b + n, 3, *s) for n, s in enumerate(row)] for b, row in enumerate(SHAPES)]
    images, sizes = on_canvas(samples, (8, 8))
    latents, features = model.input_latents(images, sizes=sizes), model.vlm._image_features(images, sizes)
    rows, tokens = [], []
    for row in samples:
        alone = [model.input_latents(image[None, None])[0, 0].flatten(1) for image in row]
        rows.append(torch.cat(alone, dim=1))
        tokens += [model.vlm.vision(image[None])[0] for image in row]
    for found, row in zip(latents, rows, strict=True):
        torch.testing.assert_close(found[0, :, 0, : row.shape[1]], row, rtol=1e-4, atol=1e-5)
        assert not found[0, :, 0, row.shape[1] :].any()
    torch.testing.assert_close(features[0], torch.cat(tokens), rtol=1e-4, atol=1e-5)
    grids = [[(2, 3), (1, 1)], [(1, 2), (1, 1)]]
    prefix = model.vlm.prefix(encoder(["a", "b"], grids), images, sizes)
    assert prefix.image_mask is not None
    assert prefix.image_mask.sum(1).tolist() == [7, 3]
    with pytest.raises(ValueError, match=r"must hold \[7, 3\] image tokens, got \[6, 3\]"):
        model.vlm.prefix(encoder(["a", "b"], [[(2, 3)], grids[1]]), images, sizes)


def waves(size: tuple[int, int], box: tuple[float, float, float, float] = (0, 0, 1, 1)) -> torch.Tensor:
    """A smooth image [3, h, w] in [0, 1]; (top, left, bottom, right) is the part of it that is seen, of 1."""
    top, left, bottom, right = box
    y = top + (bottom - top) * (torch.arange(size[0]) + 0.5) / size[0]
    x = left + (right - left) * (torch.arange(size[1]) + 0.5) / size[1]
    fast = [torch.sin(40 * y[:, None] + 9 * x), torch.sin(37 * x - 5 * y[:, None]), torch.cos(29 * (x + y[:, None]))]
    return 0.5 + 0.4 * torch.stack(fast)


def seen(size: tuple[int, int], shape: tuple[int, int]) -> tuple[float, float, float, float]:
    """The part of an image of `size` that stays when it is cropped evenly to the aspect ratio of `shape`."""
    scale = max(shape[0] / size[0], shape[1] / size[1])
    high, wide = shape[0] / size[0] / scale, shape[1] / size[1] / scale
    return (1 - high) / 2, (1 - wide) / 2, (1 + high) / 2, (1 + wide) / 2


def displacement(expected: torch.Tensor, found: torch.Tensor) -> float:
    """The largest shift of a quarter of an image, px: a wrong scale shifts them apart."""
    height, width = (side // 2 for side in expected.shape[1:])
    corners = [(slice(a, a + height), slice(b, b + width)) for a in (0, height) for b in (0, width)]
    shifts = [pixel_shift(expected[:, rows, columns], found[:, rows, columns]) for rows, columns in corners]
    assert None not in shifts
    return max(shift for shift in shifts if shift is not None)


@pytest.mark.parametrize(
    ("size", "output"), [((700, 700), None), ((633, 951), None), ((1200, 700), None), ((633, 951), (512, 512))], ids=str
)
def test_the_vlm_the_autoencoder_and_the_target_see_an_image_in_the_same_place(
    parts: StageParts, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], output: tuple[int, int] | None
):
    """At the published sizes: 28 px tokens, 32 px latents; every step of the way is compared with the exact image."""
    model = parts.recipe.model
    monkeypatch.setattr(model.vlm, "token_px", 28)
    monkeypatch.setattr(model.vae, "latent_px", 32)
    monkeypatch.setattr(model.vae.adapter, "encode", lambda _, pixels: pixels)
    monkeypatch.setattr(model.vae.cache, "capacity", 0)
    target, (bucket,) = RequestSizes(512, 32, 2.0, 2048).of([size], output)
    image = Image.fromarray((waves(size) * 255).round().byte().movedim(0, -1).numpy())
    stored = fitted(image, bucket)[None]
    top, left, bottom, right = seen(size, bucket)
    inner = seen(bucket, target)
    high, wide = bottom - top, right - left
    source = (top + high * inner[0], left + wide * inner[1], top + high * inner[2], left + wide * inner[3])
    ways = {
        "stored": (stored[0] / 255, seen(size, bucket)),
        "VLM": (model.vlm.resized(stored)[0] / 255, seen(size, bucket)),
        "VAE branch": (model.vae.encode(stored, token_grid(*bucket, 28))[0] / 2 + 0.5, seen(size, bucket)),
        "target": (model.vae.encode(stored)[0] / 2 + 0.5, seen(size, bucket)),
        "source": (model.source_latents(stored[:, None], target)[0] / 2 + 0.5, source),
    }
    for way, (found, box) in ways.items():
        exact = waves((found.shape[1], found.shape[2]), box)
        assert displacement(exact, found) < 0.1, way
        # The half pixel that a resize by corners would be off is seen.
        assert displacement(exact[:, :, 1:], (found[:, :, 1:] + found[:, :, :-1]) / 2) > 0.4, way
