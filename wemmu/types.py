"""Values that cross folders. B samples, L prompt tokens, N input images, G pathway tokens, Q queries."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from wemmu.config.task import Task

# (height, width) px of the input images of each sample, where they differ; known on the host.
Sizes = tuple[tuple[tuple[int, int], ...], ...]
# In `Batch.labels`: no token is predicted here. The value that cross-entropy ignores by default.
IGNORE_INDEX = -100


@dataclass(frozen=True)
class _OnDevice:
    """A dataclass of tensors (and other things, which stay) that moves as one."""

    def to(self, device: torch.device | str) -> Self:
        # Hooks of accelerate pass None where a tensor should stay.
        to_gpu = device is not None and torch.device(device).type == "cuda"

        def move(value: Any) -> Any:
            if to_gpu and isinstance(value, Tensor) and value.device.type == "cpu":
                # From pinned memory, the host does not wait.
                return value.pin_memory().to(device, non_blocking=True)
            if isinstance(value, tuple):
                return tuple(map(move, value))
            return value.to(device) if isinstance(value, Tensor | _OnDevice) else value

        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True)
class Prompts(_OnDevice):
    """A right-padded batch of prompts for the VLM.

    input_ids: int64 [B, L]; mask: bool [B, L], True on real tokens; positions: int64 [3, B, L] (M-RoPE);
    next_position: int64 [B], where the first token after each prompt stands. Kept on the host, which would wait for the
    device otherwise: padded, whether the mask hides anything; image_tokens: how many each prompt holds.
    """

    input_ids: Tensor
    mask: Tensor
    positions: Tensor
    next_position: Tensor
    padded: bool
    image_tokens: tuple[int, ...]


@dataclass(frozen=True)
class Latents(_OnDevice):
    """Latents that the data set stores of its images as they are, scaled, in the type they are stored in.

    target: [B, C, h, w]; images: [B, N, C, h, w], of the input images; None where they have sizes of their own.
    """

    target: Tensor
    images: Tensor | None


@dataclass(frozen=True)
class Negatives(_OnDevice):
    """The contrastive partner of each sample of a micro-batch: another sample of the same global batch.

    index: int64 [B], the partner's row among the micro-batch's own samples and, behind them, these further ones, which
    other micro-batches hold: sample_ids: int64 [E]; target: uint8 [E, 3, H, W]; latents: stored latents of `target`,
    [E, C, h, w], or None. A sample whose partner bears its own id has none.
    """

    index: Tensor
    sample_ids: Tensor
    target: Tensor
    latents: Tensor | None = None


@dataclass(frozen=True)
class Rollout(_OnDevice):
    """What the captions that a policy sampled are learnt from: G for each sample, group after group.

    advantages: float32 [B * G]. mean_length: tokens of a caption, the mean over the whole step on all ranks. logp_old,
    logp_ref: log-probabilities of the labels under the policy that sampled them and under the reference, float32
    [B * G, L], 0 where there is no label; None where the loss needs none. measures: name of a metric -> [B].
    """

    advantages: Tensor
    mean_length: float
    logp_old: Tensor | None
    logp_ref: Tensor | None
    measures: Mapping[str, Tensor]


@dataclass(frozen=True)
class Paths(_OnDevice):
    """What the images that a sampler drew are learnt from: G for each sample, group after group.

    states: x at each stochastic step and after the last one, float32 [B * G, W + 1, C, h, w]; of a cold start x at the
    first step with a gradient, [B, 1, C, h, w]. full, empty: states of the condition with and without words,
    [B, Q, C_y]. advantages: float32 [B * G]. logp_old: log-probabilities of the steps under the policy that sampled
    them, float32 [B * G, W]; None where it is the policy itself. means: where the reference expected each step to end,
    float32 [B * G, W, C, h, w]; None without a penalty. measures: name of a metric -> [B].
    """

    states: Tensor
    full: Tensor
    empty: Tensor
    advantages: Tensor
    logp_old: Tensor | None = None
    means: Tensor | None = None
    measures: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch(_OnDevice):
    """One micro-batch: one task and one shape.

    sample_ids: int64 [B], global and stable; the key of all randomness. prompts: of the VLM, image placeholders
    included, and the answers where these are to be learnt. images: uint8 [B, N, 3, H, W], N = 0 for tasks without
    input; with `sizes`, each at the top left of a canvas of zeros. target: uint8 [B, 3, H, W]; None when sampling
    and for tasks whose output is text. latents: of the same images, if the data set stores them. negatives: for
    contrastive stages. labels: int64 [B, L], of understanding: the token to predict at each token, or `IGNORE_INDEX`.
    rollout: of captions that a policy sampled; prompts and labels then have G rows for each sample. paths: of images
    that a sampler drew. answer_length: the mean number of labels of a sample over the whole step on all ranks, where
    the loss is a mean over tokens.
    """

    task: Task
    sample_ids: Tensor
    prompts: Prompts
    images: Tensor
    target: Tensor | None
    latents: Latents | None = None
    negatives: Negatives | None = None
    labels: Tensor | None = None
    rollout: Rollout | None = None
    paths: Paths | None = None
    answer_length: float | None = None
    sizes: Sizes | None = None


class Prepared(NamedTuple):
    """A step's micro-batches as the loss takes them.

    times: what was done before -> seconds on this rank. ranges: name of a metric -> its least and greatest
    value of the step, on all ranks.
    """

    batches: Sequence[Batch]
    times: Mapping[str, float] = MappingProxyType({})
    ranges: Mapping[str, tuple[float, float]] = MappingProxyType({})


@dataclass(frozen=True)
class Prefix(_OnDevice):
    """The result of the frozen VLM for a batch of prompts.

    keys, values: per layer [B, kv heads, L, head dim], positions already applied. mask: bool [B, L]. image_positions:
    [3, B, G_vae], those of the image tokens in the prompt (G_vae = 0 without images). next_position: [B], where the
    pathway's queries start. padded: False where the mask is known to hide nothing, and attention needs none.
    image_mask: bool [B, G_vae], True on image tokens; None if all prompts have as many.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor
    image_positions: Tensor
    next_position: Tensor
    padded: bool = True
    image_mask: Tensor | None = None


@dataclass(frozen=True)
class Condition(_OnDevice):
    """The condition of the DiT: states [B, Q, caption channels]; without padding, hence without a mask.

    source: latents [B, C, h, w] of the image to edit, for a DiT that takes them (`recipe.bridge.source_latents`);
    None stands for zeros.
    """

    states: Tensor
    source: Tensor | None = None


@dataclass(frozen=True)
class Flow(_OnDevice):
    """The points at which the DiT predicts velocities, and the targets; float32.

    x_t: [B, C, h, w], at times t: [B]; v: the path's velocity there, [B, C, h, w]. v_negative: [B, C, h, w] and
    paired: bool [B], of contrastive stages: the velocity of another sample, and whether there is one.
    """

    x_t: Tensor
    t: Tensor
    v: Tensor
    v_negative: Tensor | None = None
    paired: Tensor | None = None


class Begun(NamedTuple):
    """A flow-matching loss up to the DiT: where to ask for the velocity, for which condition, and the losses' tags."""

    flow: Flow
    condition: Condition
    tags: dict[str, Tensor]


class Losses(NamedTuple):
    """values: [B], float32. tags: name of a metric -> which samples count for it, bool [B]. parts:
    components of the loss per sample, name of the metric -> [B]; empty if there is one."""

    values: Tensor
    tags: dict[str, Tensor]
    parts: Mapping[str, Tensor] = MappingProxyType({})

    @classmethod
    def of_task(cls, task: Task, values: Tensor, parts: Mapping[str, Tensor] = MappingProxyType({})) -> "Losses":
        """Return losses that all count for the metric of one task."""
        return cls(values, {f"loss/{task}": torch.ones_like(values, dtype=torch.bool)}, parts)

    def detached(self) -> "Losses":
        return Losses(self.values.detach(), self.tags, {name: part.detach() for name, part in self.parts.items()})


# (micro-batch, optimizer step) -> losses, with gradient; all that an engine need know of an objective.
LossFn = Callable[[Batch, int], Losses]
# (x_t [B, C, h, w], t [B], states of the condition [B, Q, C_y]) -> velocity [B, C, h, w].
VelocityOf = Callable[[Tensor, Tensor, Tensor], Tensor]
