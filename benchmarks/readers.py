"""Readers that are compared. Each gives batches of images, uint8 [B, 3, H, W], with their captions."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torchvision.transforms.functional import pil_to_tensor

from wemmu.config import Curriculum
from wemmu.data.loader import Loader
from wemmu.pixels import stored_pixels

Batches = Iterator[tuple[Tensor, Sequence[str]]]


def captions_alone(texts: Sequence[str], grids: object) -> Sequence[str]:
    """In the place of the encoder of prompts: our loader with the work of the others."""
    return texts


def ours(curriculum: Curriculum, encoder: Any) -> Batches:
    """All steps of the only stage, shuffled."""
    stage = curriculum.stages[0]
    loader = Loader(curriculum.stage_run(stage.name), encoder, token_px=28)
    for step in range(stage.steps):
        batch: Any
        for batch in loader.micro_batches(step):
            yield batch.target, batch.prompts
    loader.close()


def web(tars: list[Path], batch: int, workers: int) -> Batches:
    """WebDataset, in the order of the tars: nothing is shuffled."""
    dataset = (
        webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False, empty_check=False)
        .to_tuple("jpg", "txt")
        .map_tuple(stored_pixels, bytes.decode)
        .batched(batch, partial=False)
    )
    yield from webdataset.WebLoader(dataset, batch_size=None, num_workers=workers)


def save_hugging_face(records: list[tuple[bytes, str]], directory: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    columns = {
        "image": [{"bytes": image, "path": None} for image, _ in records],
        "text": [caption for _, caption in records],
    }
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(directory)


def hugging_face(directory: Path, batch: int, samples: int, workers: int, decoder: str) -> Batches:
    """`samples` of `datasets`, shuffled, by a transform; "pil" is its own decoder, "torchvision" the one we use."""
    dataset = datasets.load_from_disk(directory)
    if decoder == "torchvision":
        dataset = dataset.cast_column("image", datasets.Image(decode=False))

    def tensors(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if decoder == "pil":
            images = [pil_to_tensor(image.convert("RGB")) for image in rows["image"]]
        else:
            images = [stored_pixels(image["bytes"]) for image in rows["image"]]
        return {"image": images, "text": rows["text"]}

    order = RandomSampler(dataset, num_samples=samples)
    for found in DataLoader(dataset.with_transform(tensors), batch, sampler=order, num_workers=workers):
        yield found["image"], found["text"]


def read_all(batches: Batches, samples: int, resolution: int) -> None:
    """Take everything, and make sure that it is what all sides have to give."""
    count = 0
    for images, _ in batches:
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, resolution, resolution)
        count += len(images)
    assert count == samples, (count, samples)
