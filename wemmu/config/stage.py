"""A stage of the curriculum. Where the paper is silent (facts marked OPEN), the default is argued beside the field."""

import math
from typing import Annotated, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from wemmu.config.base import Config, LocalPath, Positive, Share, SidePx
from wemmu.config.benchmarks import BenchmarkName, Benchmarks
from wemmu.config.next_resolution import NextResolution
from wemmu.config.registry import RECIPES, AnyObjective
from wemmu.config.task import Task


def _steps_or_share(value: int | float) -> int | float:
    whole = int(value)
    if value < 0 or (value != whole and value > 1) or (whole == 1 and isinstance(value, float)):
        raise ValueError("valid: a number of steps (0, 100), or below 1 a share of the stage's steps (0.05)")
    return whole if value == whole else value


# A share goes with the stage when that is shortened. 1.0 is neither: it could mean one step or all of them.
StepsOrShare = Annotated[int | float, AfterValidator(_steps_or_share)]


class Optimizer(Config):
    """AdamW; warm-up, constant, then a cosine to `final_lr_share` over the last `decay` steps."""

    lr: Annotated[float, Field(gt=0, le=1000)]
    # Learning rates of modules of `trains` that have their own, as a pre-trained DiT, which learns slower. None: `lr`.
    module_lr: dict[str, Annotated[float, Field(gt=0, le=1000)] | None] = Field(default_factory=dict)
    # Rate of the other modules' norms and biases, as a multiple of `lr`.
    vector_scale: Annotated[float, Field(gt=0, le=1000)] = 1.0
    betas: tuple[Share, Share] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.0
    # Decay of an exponential moving average (EMA) of the weights; none is kept if not given. OPEN in the paper. Off: it
    # takes 4 bytes more for each trained parameter, on the device and in checkpoints, and a stage that ends with the
    # cosine `decay` has most of what averaging gives (arXiv 2405.18392). Evaluation, `wemmu.sample` and export use it
    # if one is kept, unless --no-ema is given; the next stage starts from the weights themselves.
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    # Global norm. Clipping cannot be switched off: runs without it are known to diverge.
    clip: Annotated[float, Field(gt=0)] = 1.0
    warmup: StepsOrShare = 0
    decay: StepsOrShare = 0
    final_lr_share: Share = 0.0

    def schedule(self, steps: int) -> tuple[int, int]:
        """Return the warm-up and decay steps of a stage of `steps`; shares are rounded down."""
        # 0.29 * 100 is a little less than 29.
        warmup, decay = (n if isinstance(n, int) else int(n * steps + 1e-9) for n in (self.warmup, self.decay))
        return warmup, decay

    def rates(self, module: str | None, ndim: int) -> tuple[float, float]:
        """Return (peak learning rate, weight decay) of a parameter of a module with this number of dimensions.

        Vectors (norms, biases) are never decayed; those without a rate of their module learn `vector_scale` times as
        fast.
        """
        own = self.module_lr.get(module) if module else None
        shared = self.lr * self.vector_scale if ndim < 2 else self.lr
        return shared if own is None else own, 0.0 if ndim < 2 else self.weight_decay

    def lr_share(self, step: int, steps: int) -> float:
        """Share of the peak learning rate at `step` of `steps` (0-based)."""
        warmup, decay = self.schedule(steps)
        if step < warmup:
            return (step + 1) / warmup
        into_decay = step - (steps - decay)
        if into_decay < 0:
            return 1.0
        cosine = 0.5 * (1 + math.cos(math.pi * (into_decay + 1) / (decay + 1)))
        return self.final_lr_share + (1 - self.final_lr_share) * cosine


class BenchmarkGate(Config):
    """A bound of a score on the result card of a benchmark. score: its name on the card; else the first one there."""

    benchmark: BenchmarkName
    score: str | None = None
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _has_a_bound(self) -> Self:
        if self.at_least is None and self.at_most is None:
            raise ValueError(f"a gate on {self.benchmark} needs at_least or at_most")
        return self


class Gate(Config):
    """Conditions on a stage before the next one begins, besides a finite loss and images of several colours.

    max_loss: of the last line of its record. scores: lowest share of right answers of a task in the stage's evaluation.
    benchmarks: bounds of scores of benchmarks that run after the stage.
    """

    max_loss: float | None = None
    scores: dict[Task, Share] = Field(default_factory=dict)
    benchmarks: tuple[BenchmarkGate, ...] = ()


class _Training(Config):
    """The fields of a stage at any resolution."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_\-]+$")]
    steps: Positive
    global_batch: Positive
    # Modules of the recipe's model; its config lists them.
    trains: tuple[str, ...]
    objective: AnyObjective = Field(default_factory=RECIPES[0].objectives[0])
    optimizer: Optimizer
    # Weight of each task among the steps: a step draws its whole global batch from one task.
    mixture: dict[Task, Annotated[float, Field(gt=0, le=1e12)]]
    # Weights to start from instead of those the stage before left: a checkpoint, shipped weights or an exported
    # pipeline.
    start: LocalPath | None = None
    # Whether `start` may have been trained beside another autoencoder: one that makes the same latents, such as before
    # its decoder was tuned.
    start_other_vae: bool = False
    gate: Gate = Gate()
    # Benchmarks that run after the stage, instead of those of `evaluation`.
    benchmarks: Benchmarks | None = None
    # Ends each of several resolutions but the last.
    next_resolution: NextResolution | None = None

    @field_validator("trains")
    @classmethod
    def _trains_something(cls, trains: tuple[str, ...]) -> tuple[str, ...]:
        if not trains:
            raise ValueError("a stage must train at least one module")
        if len(set(trains)) != len(trains):
            raise ValueError(f"a module is named twice: {', '.join(trains)}")
        return trains

    @property
    def has_plateau(self) -> bool:
        """Whether the validation loss may end a resolution."""
        return self.next_resolution is not None and self.next_resolution.plateau is not None

    def averages(self, asked: bool | None) -> bool:
        """Return whether to use moving averages: `asked`, or by default whether the stage keeps them."""
        return self.optimizer.ema_decay is not None if asked is None else asked

    @model_validator(mode="after")
    def _check(self) -> Self:
        if unasked := [t for t in self.gate.scores if t not in self.mixture]:
            raise ValueError(
                f"stage {self.name}: gate.scores names {unasked[0]}, which is not in its "
                f"mixture; valid: {', '.join(self.mixture)}"
            )
        if sum(self.optimizer.schedule(self.steps)) > self.steps:
            raise ValueError(
                f"stage {self.name}: warm-up and decay are longer than its {self.steps} steps; as shares of the steps "
                "(warmup: 0.05, decay: 0.3) they shrink with the stage"
            )
        return self


class Stage(_Training):
    """One stage of the curriculum. `resolution` is the one number from which every size of the stage follows.

    Several, ascending, follow each other within the stage's steps; each but the last ends by `next_resolution`.
    """

    resolution: SidePx | tuple[SidePx, ...]

    @property
    def resolutions(self) -> tuple[int, ...]:
        return self.resolution if isinstance(self.resolution, tuple) else (self.resolution,)

    @property
    def resolution_steps(self) -> tuple["ResolutionStep", ...]:
        """The stage at each of its resolutions; one step if it has one."""
        several = self.resolutions if len(self.resolutions) > 1 else ()
        shared = {field: getattr(self, field) for field in _Training.model_fields}
        return tuple(
            ResolutionStep(**shared, resolution=resolution, resolutions=several) for resolution in self.resolutions
        )

    @model_validator(mode="after")
    def _check_resolutions(self) -> Self:
        resolutions, rule, name = self.resolutions, self.next_resolution, f"stage {self.name}"
        if not resolutions or list(resolutions) != sorted(set(resolutions)):
            raise ValueError(f"{name}: resolution is one number or several that ascend, got {list(resolutions)}")
        if rule is None:
            if len(resolutions) > 1:
                raise ValueError(f"{name}: several resolutions need next_resolution, e.g. {{samples: 1000000}}")
            return self
        if len(resolutions) == 1:
            raise ValueError(f"{name}: next_resolution is for several resolutions; this stage has one")
        limits = rule.limits(len(resolutions), self.global_batch)
        if sum(limits) >= self.steps:
            raise ValueError(
                f"{name}: the samples of next_resolution are {' + '.join(map(str, limits))} steps of "
                f"{self.global_batch}, which leaves none of its {self.steps} steps for {resolutions[-1]} px; lower "
                "samples or raise steps"
            )
        if rule.plateau is not None and rule.plateau.fewest > min(limits):
            raise ValueError(
                f"{name}: next_resolution.plateau cannot end a resolution before (window + patience) x every = "
                f"{rule.plateau.fewest} steps, and its samples end one after {min(limits)}; lower one of the three or "
                "raise samples"
            )
        return self


class ResolutionStep(_Training):
    """A stage at one resolution: what a job trains. `resolutions`: all of the stage, if it has several."""

    resolution: Positive
    # Configs of earlier versions do not say.
    resolutions: tuple[Positive, ...] = ()

    @property
    def label(self) -> str:
        """The stage, and the resolution if it has several, as `stage2@512`."""
        return f"{self.name}@{self.resolution}" if self.resolutions else self.name

    @property
    def is_last(self) -> bool:
        return not self.resolutions or self.resolution == self.resolutions[-1]

    @property
    def limit(self) -> int | None:
        """Steps that the resolution takes at most; None for the last, which ends with the stage."""
        return None if self.is_last else self._limits[self.resolutions.index(self.resolution)]

    @property
    def span(self) -> tuple[int, int]:
        """The steps from which and to which it trains if each reaches its limit; a plateau may make both earlier."""
        begin = sum(self._limits[: self.resolutions.index(self.resolution)]) if self.resolutions else 0
        return begin, self.steps if self.limit is None else begin + self.limit

    @property
    def _limits(self) -> tuple[int, ...]:
        assert self.next_resolution is not None, "a stage with several resolutions has it"
        return self.next_resolution.limits(len(self.resolutions), self.global_batch)
