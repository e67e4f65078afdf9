"""Models and batches for tests: the real classes at the miniature's sizes, random weights, images of pure noise."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wemmu.backbones.patches import patchify
from wemmu.backbones.vlm import VLM
from wemmu.config.schema import Backbones
from wemmu.config.task import Task
from wemmu.positions import token_grid
from wemmu.prompts import PromptEncoder
from wemmu.recipes.ross.build import build_ross
from wemmu.recipes.ross.config import Ross as RossConfig
from wemmu.recipes.ross.model import Ross
from wemmu.recipes.wemmu.build import build_model
from wemmu.recipes.wemmu.config import Bridge, Queries
from wemmu.recipes.wemmu.model import WeMMU
from wemmu.shapes.backbones import TOKEN_PX
from wemmu.types import Batch, Negatives, Prompts

SMALL_HEAD = {"kind": "denoiser", "depth": 2, "width": 32, "heads": 2, "repeats": 2}
WORDS = ("a red circle", "two small blue squares above a green ring", "", "remove the triangle on the left")
ANSWERS = ("yes", "two small blue squares at the top left", "a circle on the right", "no")
INPUTS = dict.fromkeys(Task, 1) | {Task.T2I: 0, Task.UNCONDITIONAL: 0, Task.MULTI_EDIT: 2}


def make_model(backbones: Backbones, design: str = "noisy", vae_branch: bool = True) -> WeMMU:
    bridge = Bridge(queries=Queries(design=design, number=9), vae_branch=vae_branch, position_table=8)
    return build_model(backbones, bridge, seed=3)[0]


def make_ross(backbones: Backbones, **config: object) -> Ross:
    return build_ross(backbones, RossConfig.model_validate(config or {"head": SMALL_HEAD}), seed=3)[0]


def awake(head: nn.Module, std: float = 0.3) -> nn.Module:
    """A head as after some training: nothing in it is zero."""
    generator = torch.Generator().manual_seed(4)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
    return head


def patches_of(model: VLM, image: Tensor) -> Tensor:
    """What the processor of the VLM makes of an image uint8 [3, H, W] of whole tokens."""
    return patchify((image[None] / 255 - model.mean) / model.std, model.patch, model.merge, model.temporal)


def random_images(seed: int, *shape: int) -> Tensor:
    """uint8 [*shape] of noise."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def encode(encoder: PromptEncoder, texts: Sequence[str], images: Tensor) -> Prompts:
    """The prompts of `texts`, each with its images [B, N, 3, H, W]."""
    count = images.shape[1]
    grid = token_grid(*images.shape[-2:], TOKEN_PX)
    return encoder(texts, [[grid] * count] * len(texts))


def make_batch(
    encoder: PromptEncoder,
    ids: Sequence[int],
    task: Task = Task.EDIT,
    size: tuple[int, int] = (32, 32),
    following: int | None = None,
) -> Batch:
    """A batch in which the content of a sample depends on its id and on nothing else.

    The contrastive partner of a sample is the next one, of the last `following`, or the first if that is None.
    """
    texts = [WORDS[i % len(WORDS)] for i in ids]
    inputs = torch.stack([random_images(i, INPUTS[task], 3, *size) for i in ids])
    further = [] if following is None else [following]
    targets = torch.stack([random_images(1000 + i, 3, *size) for i in [*ids, *further]])
    negatives = Negatives(
        index=(torch.arange(len(ids)) + 1) % len(targets),
        sample_ids=torch.tensor(further, dtype=torch.int64),
        target=targets[len(ids) :],
    )
    prompts = encode(encoder, texts, inputs)
    return Batch(task, torch.tensor(ids), prompts, inputs, targets[: len(ids)], negatives=negatives)


def make_questions(
    encoder: PromptEncoder, ids: Sequence[int], size: tuple[int, int] = (32, 32), images: int = 1
) -> Batch:
    """As `make_batch`, of questions about `images` images with their answers."""
    texts, answers = ([words[i % len(words)] for i in ids] for words in (WORDS, ANSWERS))
    inputs = torch.stack([random_images(i, images, 3, *size) for i in ids])
    grids = [[token_grid(*size, TOKEN_PX)] * images] * len(ids)
    prompts, wanted = encoder.answered(texts, answers, grids)
    return Batch(Task.UNDERSTANDING, torch.tensor(ids), prompts, inputs, target=None, labels=wanted)


def micro_batches(
    encoder: PromptEncoder, ids: Sequence[int], task: Task, rank: int, world: int, accumulation: int, images: int = 1
) -> list[Batch]:
    """What the loader gives this rank of the global batch `ids`: its slice of each accumulation step.

    images: number of those of a question.
    """
    size = len(ids) // (world * accumulation)
    firsts = [(a * world + rank) * size for a in range(accumulation)]
    if task is Task.UNDERSTANDING:
        return [make_questions(encoder, ids[f : f + size], images=images) for f in firsts]
    whole = size == len(ids)
    return [
        make_batch(encoder, ids[f : f + size], task, following=None if whole else ids[(f + size) % len(ids)])
        for f in firsts
    ]
