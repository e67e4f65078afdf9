"""FLOPs of one sample by part: two for each multiply-add of a matrix product; all else is not counted.

A product with a weight costs backward once what it costs forward for the gradient of its input, and once more for that
of the weight if it is trained; a product of two activations (attention) costs twice its forward, trained or not.
Recomputation is not counted (model FLOPs, as in MFU of PaLM, arXiv 2204.02311, appendix B).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from wemmu.config.schema import Curriculum
from wemmu.config.stage import Rung
from wemmu.config.task import Task
from wemmu.planning import autoencoder
from wemmu.planning.backbones import Language, PlanError, Sana, Sizes, Vision
from wemmu.planning.layers import linear
from wemmu.planning.parameters import (
    Part,
    dit_block,
    dit_ends,
    language_layer,
    position_mlp,
    vision_block,
    vision_embedding,
    vision_merger,
)


@dataclass(frozen=True)
class Assumptions:
    """What a sample looks like where the curriculum does not say.

    prompt_tokens: of a prompt with words, chat format included, images not. empty_prompt_tokens: of the chat format
    alone, for tasks without words. multi_edit_pictures: input images of a multi-image edit. Images are squares.
    """

    prompt_tokens: int = 128
    empty_prompt_tokens: int = 20
    multi_edit_pictures: int = 2


@dataclass(frozen=True)
class Sample:
    """Sizes of one sample. Images are squares of `resolution` px; tokens are counted in all of its images.

    encoded: sides in px of the images that the VAE encodes.
    """

    text_tokens: int
    pictures: int
    picture_side: int  # VLM tokens along an image
    vae_tokens: int
    queries: int
    latents: int
    encoded: tuple[int, ...]

    @property
    def prefix(self) -> int:
        return self.text_tokens + self.pictures * self.picture_side**2

    @property
    def pathway(self) -> int:
        return self.vae_tokens + self.queries


@dataclass(frozen=True)
class Work:
    """FLOPs forward: `weights` of products with a weight, `attention` of products of two activations.

    unreached: FLOPs backward that a gradient on its way through to an earlier part has no need of.
    """

    weights: float
    attention: float = 0.0
    unreached: float = 0.0

    @property
    def forward(self) -> float:
        return self.weights + self.attention

    def backward(self, trained: bool, passed: bool) -> float:
        """FLOPs backward of a part that is trained, or that only passes the gradient on to what stands before it."""
        if trained:
            return 2 * (self.weights + self.attention)
        return passed * (self.weights + 2 * self.attention - self.unreached)


@dataclass(frozen=True)
class Cost:
    """FLOPs of one part for one sample."""

    forward: float
    backward: float = 0.0

    @property
    def both(self) -> float:
        return self.forward + self.backward


def sample_of(task: Task, resolution: int, sizes: Sizes, curriculum: Curriculum, assumed: Assumptions) -> Sample:
    """The sizes of a sample of `task` at `resolution` px.

    Raises:
        PlanError: if an image is smaller than one token, or its grid larger than the position table.
    """
    bridge, latent_px = curriculum.recipe.bridge, sizes.vae.latent_px
    latent_side = resolution // latent_px
    side = sizes.vision.side(resolution)
    if not 0 < side <= bridge.position_table or latent_side == 0:
        raise PlanError(
            f"{resolution} px are {side} VLM tokens of {sizes.vision.token_px} px and {latent_side} latents of "
            f"{latent_px} px a side; valid: at least 1, and at most bridge.position_table = {bridge.position_table}"
        )
    pictures = {Task.RECONSTRUCTION: 1, Task.EDIT: 1, Task.MULTI_EDIT: assumed.multi_edit_pictures}.get(task, 0)
    wordless = task in (Task.RECONSTRUCTION, Task.UNCONDITIONAL)
    stored = curriculum.data.prepare is not None and curriculum.data.prepare.latents is not None
    # As `WeMMU.input_latents`: stored latents serve an input image only if its VLM tokens stand on the same grid.
    inputs = pictures * bridge.vae_branch * (not (stored and side == latent_side))
    return Sample(
        text_tokens=assumed.empty_prompt_tokens if wordless else assumed.prompt_tokens,
        pictures=pictures,
        picture_side=side,
        vae_tokens=pictures * side**2 * bridge.vae_branch,
        queries=bridge.queries.number if bridge.queries.design == "learnable_fixed" else side**2,
        latents=(latent_side // sizes.dit.patch_size) ** 2,
        encoded=(resolution,) * (not stored) + (side * latent_px,) * inputs,
    )


def sample_flops(sample: Sample, sizes: Sizes, stage: Rung) -> dict[Part, Cost]:
    """FLOPs of one training sample, by part, with what `stage` trains."""
    language, trains = sizes.language, stage.trains
    frozen: dict[Part, Cost] = {
        "vision": Cost(sample.pictures * vision(sizes.vision, sample.picture_side)),
        "language": Cost(prefix(language, sample.prefix)),
        "vae": Cost(sum(2 * autoencoder.encoder_products(sizes.vae, side) for side in sample.encoded)),
    }
    # The branch's input is data, so it has the gradient of its weight alone.
    branch = 2.0 * sample.vae_tokens * linear(sizes.vae.latent_channels, language.hidden_size).products
    costs = frozen | {"vae_branch": Cost(branch, branch * ("vae_branch" in trains))}
    passed = bool({"vae_branch", "queries"} & set(trains))
    chain: dict[Part, Work] = {
        "pathway": pathway(language, sample.pathway, sample.prefix),
        "position_mlp": Work(
            2.0 * sample.queries * position_mlp(language.hidden_size, sizes.dit.caption_channels).products
        ),
        "dit": dit(sizes.dit, sample.latents, sample.queries),
    }
    for part, work in chain.items():
        costs[part] = Cost(work.forward, work.backward(part in trains, passed))
        passed = passed or part in trains
    return costs


def vision(c: Vision, side: int) -> float:
    """The tower forward, for an image of `side` x `side` tokens; most blocks attend within windows only."""
    tokens, merged = side**2, c.spatial_merge_size**2
    patches = tokens * merged
    window = c.window_size // c.token_px
    rows = [min(window, side - start) for start in range(0, side, window)]
    within = (merged * sum(n**2 for n in rows)) ** 2  # pairs of patches that share a window
    full = len([i for i in c.fullatt_block_indexes if i < c.depth])
    pairs = full * patches**2 + (c.depth - full) * within
    weights = patches * (vision_embedding(c).products + c.depth * vision_block(c).products)
    return 2.0 * (weights + tokens * vision_merger(c).products) + 4.0 * pairs * c.hidden_size


def prefix(c: Language, tokens: int) -> float:
    """The frozen language model forward over a prompt of `tokens`, to the keys and values of its last layer.

    Causal attention costs half.
    """
    whole = c.num_hidden_layers - 1
    last = linear(c.hidden_size, c.hidden_size).products + 2 * linear(c.hidden_size, c.kv_width).products
    weights = language_layer(c).products * whole + last
    return 2.0 * tokens * weights + 2.0 * tokens**2 * c.hidden_size * whole


def language_products(c: Language) -> int:
    """Multiply-adds per token of all layers."""
    return language_layer(c).products * c.num_hidden_layers


def pathway(c: Language, tokens: int, prefix: int) -> Work:
    """The pathway's `tokens`, which attend to each other and to the `prefix` tokens of every layer."""
    attention = 4.0 * tokens * (prefix + tokens) * c.hidden_size * c.num_hidden_layers
    return Work(2.0 * tokens * language_products(c), attention)


def dit(c: Sana, latents: int, condition: int) -> Work:
    """Sana on `latents` positions with `condition` tokens."""
    block, ends = dit_block(c), dit_ends(c)
    per_latent = block.latent.products * c.num_layers + ends.latent.products
    per_condition = block.condition.products * c.num_layers + ends.condition.products
    weights = 2.0 * (latents * per_latent + condition * per_condition + ends.once.products)
    # Linear attention: two products of [head + 1, N] and [N, head] for each head.
    own = 4.0 * latents * c.width * (c.attention_head_dim + 1)
    across = 4.0 * latents * condition * c.cross_width
    # The condition enters at the first block's cross-attention: nothing before it lies on the gradient's way.
    before = c.in_channels * c.patch_size**2 * c.width + 4 * c.width**2 + c.width * c.cross_width
    unreached = 2.0 * (latents * before + ends.once.products) + 2 * own + across / 2
    return Work(weights, (own + across) * c.num_layers, unreached)


def mean_flops(by_task: Mapping[Task, Mapping[Part, Cost]], mixture: Mapping[Task, float]) -> float:
    """FLOPs of the average sample; a step draws its whole batch from one task, by the weights of the mixture."""
    weight = sum(mixture.values())
    return sum(mixture[task] / weight * cost.both for task, costs in by_task.items() for cost in costs.values())
