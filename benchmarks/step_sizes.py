"""What `benchmarks.step` steps on: the real classes with random weights in three sizes, and batches of noise."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models import AutoencoderDC, SanaTransformer2DModel
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.models import published
from wemmu.backbones.vae import FrozenVAE
from wemmu.backbones.vlm import FrozenVLM
from wemmu.config import Curriculum, StageRun
from wemmu.config.task import Task
from wemmu.positions import prompt_positions, token_grid
from wemmu.recipes.wemmu.bridge import Bridge
from wemmu.recipes.wemmu.config import Bridge as BridgeConfig
from wemmu.recipes.wemmu.model import WeMMU
from wemmu.shapes.backbones import DIT_CONFIG, VAE_CONFIG, vlm_config
from wemmu.types import Batch, Negatives, Prompts

# Ids below this are special tokens in every size; text is drawn from the others.
FIRST_WORD = 8
SPECIAL = {
    "bos_token_id": 0,
    "eos_token_id": 2,
    "vision_start_token_id": 3,
    "vision_end_token_id": 4,
    "vision_token_id": 5,
    "image_token_id": 6,
    "video_token_id": 7,
}
BRIDGE = ("vae_branch", "pathway", "position_mlp")


@dataclass(frozen=True)
class Cell:
    """What is measured together: a micro-batch of `samples` of one task, in a stage that trains `trains`."""

    stage: str
    task: Task
    px: int
    samples: int
    trains: tuple[str, ...]
    kind: str = "flow"

    @property
    def name(self) -> str:
        return f"{self.stage}, {self.task}, {self.px} px, {self.samples} samples"

    def of(self, samples: int) -> "Cell":
        return replace(self, samples=samples)


def first(task: Task, px: int, samples: int) -> Cell:
    """The settings of stage 1: the DiT is frozen, the objective contrastive."""
    return Cell("stage 1", task, px, samples, BRIDGE, "contrastive")


def second(task: Task, px: int, samples: int) -> Cell:
    """The settings of stages 2 to 4."""
    return Cell("stage 2", task, px, samples, (*BRIDGE, "dit"))


@dataclass(frozen=True)
class Size:
    """vlm, dit, vae: configurations of the real classes. text: tokens of the longest prompt without its images.

    together: whether several variants fit into one process, where they take turns.
    """

    vlm: dict[str, Any]
    dit: dict[str, Any]
    vae: dict[str, Any]
    text: int
    cells: tuple[Cell, ...]
    together: bool = True


def miniature() -> Size:
    """The miniature that the demo trains (wemmu/shapes/backbones.py)."""
    cells = (first(Task.T2I, 32, 16), second(Task.EDIT, 64, 16))
    return Size(vlm_config(512, SPECIAL), DIT_CONFIG, VAE_CONFIG, 32, cells)


def middle() -> Size:
    """Half the published widths and a seventh to a ninth of the depth, with the published ratios; 256 px."""
    vlm = {
        **published.QWEN,
        **SPECIAL,
        "vocab_size": 12800,
        "hidden_size": 1024,
        "intermediate_size": 5504,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_hidden_layers": 4,
        "vision_config": published.QWEN["vision_config"]
        | {"depth": 4, "hidden_size": 640, "intermediate_size": 1710, "num_heads": 8, "out_hidden_size": 1024}
        | {"fullatt_block_indexes": [3]},
    }
    dit = published.SANA | {"num_attention_heads": 35, "num_layers": 3, "num_cross_attention_heads": 10}
    dit |= {"cross_attention_dim": 1120, "caption_channels": 1152}
    widths = [32, 64, 128, 128, 256, 256]
    vae = published.DCAE | {"encoder_block_out_channels": widths, "decoder_block_out_channels": widths}
    return Size(vlm, dit, vae, 64, (first(Task.T2I, 256, 2), second(Task.EDIT, 256, 2)))


def real() -> Size:
    """Qwen2.5-VL-3B, Sana 1.6B and DC-AE f32c32 as published; the special tokens alone have other ids."""
    cells = (
        first(Task.T2I, 512, 4),
        first(Task.EDIT, 512, 2),
        second(Task.T2I, 1024, 1),
        second(Task.EDIT, 1024, 1),
    )
    return Size(published.QWEN | SPECIAL, published.SANA, published.DCAE, 128, cells, together=False)


SIZES = {"miniature": miniature, "middle": middle, "real": real}


def shallower(size: Size, layers: int) -> Size:
    """The same widths with at most `layers` layers of the language model and blocks of the DiT."""
    vlm, dit = dict(size.vlm), dict(size.dit)
    text = dict(vlm.pop("text_config", vlm))
    text["num_hidden_layers"] = min(layers, text["num_hidden_layers"])
    dit["num_layers"] = min(layers, dit["num_layers"])
    vlm = vlm | {"text_config": text} if "text_config" in size.vlm else vlm | text
    return Size(vlm, dit, size.vae, size.text, size.cells, size.together)


def make_model(size: Size, device: torch.device, dtype: torch.dtype) -> WeMMU:
    """The whole model with random weights, made in `dtype` on `device`; the pathway is a copy of the VLM's layers."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            vlm = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**size.vlm))
            vae, dit = AutoencoderDC(**size.vae), SanaTransformer2DModel(**size.dit)
    finally:
        torch.set_default_dtype(before)
    frozen = FrozenVLM(vlm, [0.5] * 3, [0.5] * 3)
    encoder = FrozenVAE(vae)
    bridge = Bridge(BridgeConfig(), frozen.language_model, encoder.latent_channels, dit.config.caption_channels)
    # The pathway is a copy of a frozen model: it must be told that it learns.
    bridge.to(dtype).requires_grad_(True)
    return WeMMU(frozen, encoder, bridge, dit).to(device).train()


def make_run(cell: Cell, engine: str, dtype: str) -> StageRun:
    """The stage of `make_curriculum`, of a model that comes from no files."""
    return make_curriculum(cell, engine, {"vlm": "nowhere", "sana": "nowhere", "dtype": dtype}).stage_run("step")


def make_curriculum(cell: Cell, engine: str, backbones: dict[str, str]) -> Curriculum:
    """The config of a stage that steps on one micro-batch of the cell."""
    stage = {
        "name": "step",
        "resolution": cell.px,
        "steps": 1000,
        "global_batch": cell.samples,
        "trains": cell.trains,
        "objective": {"kind": cell.kind},
        "optimizer": {"lr": 1e-5, "module_lr": {"dit": 1e-6}},
        "mixture": {cell.task: 1.0},
    }
    return Curriculum.model_validate(
        {
            "name": "step",
            "backbones": backbones,
            "data": {"shards": "nowhere"},
            "memory": {"micro_batch": cell.samples, "reference_resolution": cell.px},
            "parallel": {"engine": engine},
            "stages": [stage],
        }
    )


def text_lengths(size: Size, cell: Cell) -> list[int]:
    """Tokens of each prompt without its images: captions differ in length, so most batches are padded."""
    return [size.text - i * size.text // (2 * cell.samples) for i in range(cell.samples)]


def make_batch(size: Size, cell: Cell, token_px: int) -> Batch:
    """Random words and images; the same for all variants."""
    generator = torch.Generator().manual_seed(1)
    grid = token_grid(cell.px, cell.px, token_px)
    images = 1 if cell.task == Task.EDIT else 0
    words = size.vlm.get("text_config", size.vlm)["vocab_size"]

    def noise(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    def row(length: int) -> list[int]:
        text = torch.randint(FIRST_WORD, words, (length,), generator=generator).tolist()
        image = [SPECIAL["image_token_id"]] * (images * grid[0] * grid[1])
        return text[:3] + image + text[3:]

    prompts = prompts_of([row(length) for length in text_lengths(size, cell)], [grid] * images)
    return Batch(
        task=cell.task,
        sample_ids=torch.arange(cell.samples),
        prompts=prompts,
        images=noise(cell.samples, images, 3, cell.px, cell.px),
        target=noise(cell.samples, 3, cell.px, cell.px),
        negatives=Negatives(
            index=(torch.arange(cell.samples) + 1) % cell.samples,
            sample_ids=torch.zeros(0, dtype=torch.int64),
            target=noise(0, 3, cell.px, cell.px),
        ),
    )


def prompts_of(rows: list[list[int]], grids: list[tuple[int, int]]) -> Prompts:
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[i < len(row) for i in range(length)] for row in rows])
    placed = [prompt_positions(row, SPECIAL["image_token_id"], grids) for row in rows]
    positions = torch.zeros(3, len(rows), length, dtype=torch.long)
    for b, (position, _) in enumerate(placed):
        positions[:, b, : position.shape[1]] = position
    ends = torch.tensor([end for _, end in placed])
    counts = tuple(row.count(SPECIAL["image_token_id"]) for row in rows)
    return Prompts(ids, mask, positions, ends, not bool(mask.all()), counts)
