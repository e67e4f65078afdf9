"""Backbones of which only the config.json files are there, with the published values."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.models import published
from wemmu.config import Curriculum, load_curriculum
from wemmu.config.schema import Backbones
from wemmu.planning import ask
from wemmu.planning.layout import Degrees
from wemmu.planning.plan import Machine

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "configs/curriculum/paper.yaml"
MINIATURE = ROOT / "configs/shapes/curriculum.yaml"


def write_published(root: Path) -> Backbones:
    """The directories of the published backbones, without weights."""
    folders = {
        "vlm": {"model_type": "qwen2_5_vl", **published.QWEN},
        "sana/transformer": {"_class_name": "SanaTransformer2DModel", **published.SANA},
        "sana/vae": {"_class_name": "AutoencoderDC", **published.DCAE},
    }
    for folder, config in folders.items():
        (root / folder).mkdir(parents=True)
        (root / folder / "config.json").write_text(json.dumps(config))
    return Backbones(vlm=root / "vlm", sana=root / "sana", dtype="bfloat16")


def curriculum_with(file: Path, backbones: Backbones, *overrides: str) -> Curriculum:
    """The curriculum of `file`, on these backbones."""
    return load_curriculum(file, overrides).model_copy(update={"backbones": backbones})


def on(world: int, tp: int = 1, pp: int = 1, mfu: float = 0.35) -> Machine:
    return Machine("h100", Degrees(world, tp, pp), mfu)


def in_this_process(measure: Callable[[Path, Any], Any]) -> Callable[[dict[str, Any]], Iterator[Any]]:
    """What the child does, without a child."""

    def answer(request: dict[str, Any]) -> Iterator[Any]:
        with ask.written(request["configs"]) as folder:
            yield from map(partial(measure, folder), request["items"])

    return answer
