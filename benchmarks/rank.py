"""One rank of a large world, played by this process: the model at its real size, its engine, and its samples."""

import torch
import torch.distributed as dist
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from wemmu.backbones.vae import FrozenVAE
from wemmu.backbones.vlm import FrozenVLM
from wemmu.config.schema import StageRun
from wemmu.config.task import Task
from wemmu.parallel.topology import Topology
from wemmu.planning.flops import Sample
from wemmu.positions import prompt_positions
from wemmu.recipes.wemmu.bridge import Bridge
from wemmu.recipes.wemmu.model import WeMMU
from wemmu.types import Batch, Negatives, Prompts


def join(rank: int, world: int) -> None:
    """Be `rank` of `world` ranks, of which the others are not there: collectives return at once."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)


def make_model(run: StageRun) -> WeMMU:
    """The model of the config.json files of `run`, frozen as its stage says; within a `fake_world` it has no weights.

    As `wemmu.backbones.weights.build_model`, which reads weights.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, run.backbones.dtype))
    try:
        config = Qwen2_5_VLConfig.from_pretrained(run.backbones.vlm)
        vlm = FrozenVLM(Qwen2_5_VLForConditionalGeneration(config), mean=[0.5] * 3, std=[0.5] * 3)
        vae = FrozenVAE(AutoencoderDC.from_config(AutoencoderDC.load_config(run.backbones.vae)))
        dit_config = SanaTransformer2DModel.load_config(run.backbones.dit)
        dit = SanaTransformer2DModel.from_config(dit_config)
        bridge = Bridge(run.recipe.bridge, vlm.language_model, vae.latent_channels, dit.config.caption_channels)
    finally:
        torch.set_default_dtype(before)
    model = WeMMU(vlm, vae, bridge, dit)
    model.freeze_all_but(run.stage.trains)
    model.train()
    if run.memory.checkpointing:
        model.checkpoint_activations()
    return model


def make_batch(run: StageRun, task: Task, sample: Sample, micro: int, token_ids: tuple[int, int]) -> Batch:
    """A micro-batch of `micro` samples of `task`, as large as `sample` says. token_ids: of a word and of an image.

    The contrastive partner of its last sample is in another micro-batch, as in the loader's.
    """
    side, px = sample.picture_side, run.stage.resolution
    word, image = token_ids
    ids = [word] * sample.text_tokens
    middle = sample.text_tokens // 2
    for _ in range(sample.pictures):
        # A word between images, or they would be one.
        ids[middle:middle] = [image] * side**2
        middle += side**2 + 1
    positions, following = prompt_positions(ids, image, [(side, side)] * sample.pictures)

    def repeated(values: Tensor) -> Tensor:
        return values[None].repeat(micro, *[1] * values.ndim)

    prompts = Prompts(
        input_ids=repeated(torch.tensor(ids)),
        mask=torch.ones(micro, len(ids), dtype=torch.bool),
        positions=positions[:, None].repeat(1, micro, 1),
        next_position=torch.full((micro,), following),
    )
    images = torch.zeros(micro, sample.pictures, 3, px, px, dtype=torch.uint8)
    target = torch.zeros(micro, 3, px, px, dtype=torch.uint8)
    negatives = Negatives((torch.arange(micro) + 1), torch.tensor([micro]), target[:1])
    contrastive = run.stage.objective.kind == "contrastive"
    return Batch(task, torch.arange(micro), prompts, images, target, negatives=negatives if contrastive else None)


def make_engine(model: WeMMU, run: StageRun, topology: Topology):
    from wemmu.recipes.wemmu.loss import FlowMatchingLoss

    loss = FlowMatchingLoss(model, run)
    if run.parallel.engine == "zero3":
        from wemmu.parallel.zero3 import Zero3Engine

        return Zero3Engine(model, loss, run, topology, torch.device("cpu"))
    from wemmu.parallel.hybrid import HybridEngine

    return HybridEngine(model, loss, run, topology, torch.device("cpu"))
