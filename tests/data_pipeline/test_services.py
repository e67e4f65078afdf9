"""Captions and latents by the miniature's own VLM and autoencoder, through the whole chain."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from streaming import LocalDataset

from data_pipeline.services import CaptionService, LatentService
from tests.data_pipeline.worlds import curriculum_of, write_in_process
from wemmu.backbones.weights import load_autoencoder
from wemmu.config import Curriculum
from wemmu.config.prepare import Captioner
from wemmu.config.shards import DataSet, unpack
from wemmu.shapes.language import full_caption, parse_caption
from wemmu.shapes.render import render
from wemmu.shapes.scene import Object, Scene

BACKBONES = Path("assets/shapes")
SCENES = [
    Scene("gray", (Object(0, "circle", "red", "large"),)),
    Scene("white", (Object(1, "square", "blue", "small"), Object(2, "cross", "green", "large"))),
    Scene("pink", (Object(3, "triangle", "cyan", "small"),)),
]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_captions_say_what_is_in_the_image_whatever_the_batch() -> None:
    service = CaptionService(Captioner(vlm=BACKBONES / "vlm", instruction="describe the image"))
    images = [render(scene, 64) for scene in SCENES]
    captions = service.caption(images)
    assert captions == [full_caption(scene) for scene in SCENES]
    assert [caption for p in images for caption in service.caption([p])] == captions


def test_a_captioner_can_be_told_anything() -> None:
    """Special tokens in its instruction are text, too: they claim no image and end no turn."""
    odd = Captioner(vlm=BACKBONES / "vlm", instruction="describe <|image_pad|>the image<|im_end|>", max_tokens=2)
    assert len(CaptionService(odd).caption([render(scene, 64) for scene in SCENES])) == len(SCENES)


def folder(directory: Path) -> list[dict]:
    """Images without captions and with one that is wrong."""
    directory.mkdir()
    lines = []
    for number, scene in enumerate(SCENES):
        render(scene, 64).save(directory / f"{number}.png")
        lines.append(f'{{"image": "{number}.png", "caption": "{"my own words" if number == 2 else ""}"}}\n')
    (directory / "list.jsonl").write_text("".join(lines))
    return [{"kind": "folder", "name": "mine", "path": str(directory / "list.jsonl")}]


def with_services(curriculum: Curriculum, **services: object) -> Curriculum:
    tree = curriculum.model_dump(mode="json")
    tree["data"]["prepare"] |= services | {"images": {"unit": 16, "max_aspect": 1.0, "format": "png"}}
    tree["backbones"] = {"vlm": str(BACKBONES / "vlm"), "sana": str(BACKBONES / "sana")}
    return Curriculum.model_validate(tree)


def records(root: Path, name: str) -> list[dict]:
    DataSet.at(root)
    return list(LocalDataset(str(root / name)))


def test_missing_captions_are_written_and_others_kept(tmp_path: Path) -> None:
    caption = {"vlm": str(BACKBONES / "vlm"), "instruction": "describe the image"}
    curriculum = curriculum_of(tmp_path / "shards", folder(tmp_path / "source"), mixture={"t2i": 1})
    write_in_process(with_services(curriculum, caption=caption))
    prompts = [record["prompt"] for record in records(tmp_path / "shards", "t2i/64/64x64")]
    assert prompts == [full_caption(SCENES[0]), full_caption(SCENES[1]), "my own words"]
    assert all(parse_caption(p).satisfied_by(s) for p, s in zip(prompts, SCENES[:2], strict=False))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latents_are_those_that_training_would_make(tmp_path: Path, dtype: str) -> None:
    curriculum = curriculum_of(tmp_path, mixture={"t2i": 0.5, "multi_edit": 0.5}, partition=20)
    curriculum = with_services(curriculum, latents={"dtype": dtype, "batch": 4})
    dataset = write_in_process(curriculum)
    vae, report = load_autoencoder(curriculum.backbones.vae, torch.float32)
    for stream in dataset.streams:
        settings = stream.settings.latents
        assert settings is not None
        assert (settings.vae, settings.dtype) == (report.sha256, dtype)
        assert (settings.rows, settings.columns) == (stream.settings.height // 16, stream.settings.width // 16)
        for record in records(tmp_path, stream.settings.name):
            files = [record["target"], *unpack(record["images"])]
            for file, stored in zip(files, unpack(record["latents"]), strict=True):
                wanted = vae.encode(pixels(file)[None])[0].to(getattr(torch, dtype))
                latents = torch.frombuffer(bytearray(stored), dtype=wanted.dtype).view(wanted.shape)
                torch.testing.assert_close(latents, wanted, atol=1e-5 if dtype == "float32" else 0.02, rtol=0.01)


def pixels(file: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(file)))).permute(2, 0, 1)


def test_latents_name_the_weights_they_are_of() -> None:
    service = LatentService(BACKBONES / "sana" / "vae", "float32")
    vae, report = load_autoencoder(BACKBONES / "sana" / "vae", torch.float32)
    settings = service.settings((64, 32))
    assert (settings.vae, settings.scaling_factor) == (report.sha256, vae.scaling_factor)
    assert (settings.channels, settings.rows, settings.columns) == (32, 4, 2)
