"""A stage of the curriculum. Where the paper is silent (facts marked OPEN), the default is argued beside the field."""

import math
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, Field, field_validator, model_validator

from wemmu.config.base import Config, LocalPath, Positive, Share
from wemmu.config.ladder import NextRung
from wemmu.config.task import GENERATION_TASKS, UNDERSTANDING_TASKS, Task

# What a stage can train: of the bridge and the DiT, or of a VLM that learns to answer and to reconstruct.
GenerationModule = Literal["vae_branch", "pathway", "position_mlp", "queries", "dit"]
UnderstandingModule = Literal["projector", "llm", "head"]
Module = Literal[GenerationModule, UnderstandingModule]
# How the names of each module's weights begin, in checkpoints and in manifests. Of a frozen VLM they begin `vlm.vlm.`.
WEIGHTS: dict[Module, tuple[str, ...]] = {
    "vae_branch": ("bridge.vae_branch.",),
    "pathway": ("bridge.pathway.",),
    "position_mlp": ("bridge.position_mlp.",),
    "queries": ("bridge.queries.",),
    "dit": ("dit.",),
    "projector": ("vlm.model.visual.merger.",),
    "llm": ("vlm.model.language_model.", "vlm.lm_head."),
    "head": ("head.",),
}


class TimeSampling(Config):
    """Distribution of t in training (t = 1 is noise). OPEN in the paper; Sana's own: logit-normal, shift 3.

    t ~ sigmoid(N(mean, std^2)), then t <- s t / (1 + (s - 1) t) with s = `shift` at `reference_resolution`, scaled by
    (resolution / reference_resolution) ** `resolution_exponent`: the signal-to-noise ratio of a picture grows with its
    side, so exponent 1 keeps the difficulty of t the same across the resolutions of the curriculum.
    """

    kind: Literal["logit_normal", "uniform"] = "logit_normal"
    mean: float = 0.0
    std: Annotated[float, Field(gt=0)] = 1.0
    shift: Annotated[float, Field(gt=0)] = 3.0
    reference_resolution: Positive = 1024
    resolution_exponent: float = 1.0

    def shift_at(self, resolution: int) -> float:
        return float(self.shift * (resolution / self.reference_resolution) ** self.resolution_exponent)


class LossWeighting(Config):
    """Weight of a sample's loss by its time t. OPEN in the paper; uniform, as Sana and SD3 (arXiv 2403.03206) train.

    SD3 samples t from a logit-normal instead of weighting the loss: in expectation a density over t and a weight over
    t are the same, and the density spends its samples where the weight would be large. With `time` at its default a
    further weight would count twice. The other kinds have the names that SD3's scripts and min-SNR gave them:

    sigma_sqrt  t^-2; unbounded near the data
    cosmap      2 / (pi (1 - 2 t + 2 t^2))
    min_snr     min(SNR, `gamma`) on the error of x_0 (arXiv 2303.09556), SNR = ((1 - t) / t)^2. The error of x_0 is t
                times that of v, so the weight on v is min((1 - t)^2, gamma t^2)
    """

    kind: Literal["uniform", "sigma_sqrt", "cosmap", "min_snr"] = "uniform"
    # The paper of min-SNR: 5.
    gamma: Annotated[float, Field(gt=0)] = 5.0


class Objective(Config):
    """flow: conditional flow matching. contrastive: minus `weight` times the distance to another sample's target."""

    kind: Literal["flow", "contrastive"] = "flow"
    weight: Share = 0.05
    time: TimeSampling = TimeSampling()
    weighting: LossWeighting = LossWeighting()


class ReconstructiveTuning(Config):
    """ROSS: cross-entropy of the answer plus `weight` times the loss of reconstruction (the paper: 1).

    Both are means over a sample, then over the global batch, so neither depends on how samples share the devices.
    """

    kind: Literal["reconstructive"]
    weight: Annotated[float, Field(ge=0)] = 1.0


def _steps_or_share(value: int | float) -> int | float:
    whole = int(value)
    if value < 0 or (value != whole and value > 1) or (whole == 1 and isinstance(value, float)):
        raise ValueError("valid: a number of steps (0, 100), or below 1 a share of the stage's steps (0.05)")
    return whole if value == whole else value


# A share goes with the stage when that is shortened. 1.0 is neither: it could mean one step or all of them.
StepsOrShare = Annotated[int | float, AfterValidator(_steps_or_share)]


class Optimizer(Config):
    """AdamW; warm-up, constant, then a cosine to `final_lr_share` over the last `decay` steps."""

    lr: Annotated[float, Field(gt=0)]
    # Learning rate of the DiT, pre-trained and therefore slower; OPEN in the paper.
    dit_lr: Annotated[float, Field(gt=0)] | None = None
    # Learning rate of a head that reconstructs; `lr` if not given.
    head_lr: Annotated[float, Field(gt=0)] | None = None
    # Rate of the bridge's norms and biases, as a multiple of `lr`.
    vector_scale: Annotated[float, Field(gt=0)] = 1.0
    betas: tuple[Share, Share] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    # Decay of an exponential moving average (EMA) of the weights; none is kept if not given. OPEN in the paper. Off: it
    # takes 4 bytes more for each trained parameter, on the device and in checkpoints, and a stage that ends with the
    # cosine `decay` has most of what averaging gives (arXiv 2405.18392). Evaluation, `wemmu.sample` and export use it
    # where one is kept, unless told otherwise; the next stage goes on from the weights themselves.
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    # Global norm; there is no way to switch clipping off (a run without it diverged for users of a peer).
    clip: Annotated[float, Field(gt=0)] = 1.0
    warmup: StepsOrShare = 0
    decay: StepsOrShare = 0
    final_lr_share: Share = 0.0

    def schedule(self, steps: int) -> tuple[int, int]:
        """Steps of the warm-up and of the decay, in a stage of `steps`; shares are rounded down."""
        # 0.29 * 100 is a little less than 29.
        warmup, decay = (n if isinstance(n, int) else int(n * steps + 1e-9) for n in (self.warmup, self.decay))
        return warmup, decay

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


class Gate(Config):
    """What must hold of a stage before the next one begins, besides a finite loss and pictures with something on.

    max_loss: of the last line of its record. scores: lowest share of right answers of a task in the stage's evaluation.
    """

    max_loss: float | None = None
    scores: dict[Task, Share] = Field(default_factory=dict)


class _Training(Config):
    """What a stage is, whatever its resolution."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_\-]+$")]
    steps: Positive
    global_batch: Positive
    trains: tuple[Module, ...]
    objective: Annotated[Objective | ReconstructiveTuning, Field(discriminator="kind")] = Objective()
    optimizer: Optimizer
    # Weight of each task among the steps: a step draws its whole global batch from one task.
    mixture: dict[Task, Annotated[float, Field(gt=0)]]
    # Weights to start from instead of those the stage before left: a checkpoint directory or an exported bridge.
    start: LocalPath | None = None
    gate: Gate = Gate()

    @field_validator("trains")
    @classmethod
    def _trains_something(cls, trains: tuple[Module, ...]) -> tuple[Module, ...]:
        if not trains:
            raise ValueError("a stage must train at least one module")
        if len(set(trains)) != len(trains):
            raise ValueError(f"a module is named twice: {', '.join(trains)}")
        return trains

    @property
    def reconstructs(self) -> bool:
        """Whether a VLM learns to answer (ROSS), and not a bridge to generate."""
        return isinstance(self.objective, ReconstructiveTuning)

    def averages(self, asked: bool | None) -> bool:
        """Whether the moving averages of the weights are used: what was asked, else whether the stage keeps them."""
        return self.optimizer.ema_decay is not None if asked is None else asked

    @property
    def generation_modules(self) -> tuple[GenerationModule, ...]:
        """What it trains of a bridge and a DiT."""
        return tuple(module for module in get_args(GenerationModule) if module in self.trains)

    @model_validator(mode="after")
    def _check(self) -> Self:
        tasks = UNDERSTANDING_TASKS if self.reconstructs else GENERATION_TASKS
        modules = get_args(UnderstandingModule if self.reconstructs else GenerationModule)
        kind = f"whose objective is {self.objective.kind}"
        if not self.mixture:
            raise ValueError(f"stage {self.name}: the mixture is empty; valid tasks: {', '.join(tasks)}")
        if wrong := [t for t in self.mixture if t not in tasks]:
            raise ValueError(
                f"stage {self.name}: {', '.join(wrong)} is no task of a stage {kind}; valid: {', '.join(tasks)}"
            )
        if absent := [m for m in self.trains if m not in modules]:
            raise ValueError(
                f"stage {self.name} has no {', '.join(absent)} to train, {kind}; valid: {', '.join(modules)}"
            )
        if unasked := [t for t in self.gate.scores if t not in self.mixture]:
            raise ValueError(f"stage {self.name}: gate.scores of {unasked[0]}, which its mixture has not")
        if sum(self.optimizer.schedule(self.steps)) > self.steps:
            raise ValueError(
                f"stage {self.name}: warm-up and decay are longer than its {self.steps} steps; as shares of the steps "
                "(warmup: 0.05, decay: 0.3) they shrink with the stage"
            )
        if "dit" in self.trains and self.optimizer.dit_lr is None:
            raise ValueError(f"stage {self.name} trains the DiT, so optimizer.dit_lr is needed")
        if self.objective.kind == "contrastive" and self.global_batch < 2:
            raise ValueError(f"stage {self.name}: the contrastive objective needs another sample in the batch")
        return self


class Stage(_Training):
    """One stage of the curriculum. `resolution` is the one number from which every size of the stage follows.

    Several, ascending, are a ladder: stretches of the stage's one axis of steps, each of which ends by `next_rung`.
    """

    resolution: Positive | tuple[Positive, ...]
    next_rung: NextRung | None = None

    @property
    def resolutions(self) -> tuple[int, ...]:
        return self.resolution if isinstance(self.resolution, tuple) else (self.resolution,)

    @property
    def rungs(self) -> tuple["Rung", ...]:
        """The stage at each of its resolutions; one rung if it has one."""
        ladder = self.resolutions if len(self.resolutions) > 1 else ()
        shared = {field: getattr(self, field) for field in _Training.model_fields}
        return tuple(
            Rung(**shared, resolution=resolution, ladder=ladder, next_rung=self.next_rung)
            for resolution in self.resolutions
        )

    @model_validator(mode="after")
    def _check_ladder(self) -> Self:
        resolutions, rule, name = self.resolutions, self.next_rung, f"stage {self.name}"
        if not resolutions or list(resolutions) != sorted(set(resolutions)):
            raise ValueError(f"{name}: resolution is one number or several that ascend, got {list(resolutions)}")
        if rule is None:
            if len(resolutions) > 1:
                raise ValueError(f"{name}: a ladder needs next_rung, e.g. {{samples: 1000000}}, which ends its rungs")
            return self
        if len(resolutions) == 1:
            raise ValueError(f"{name}: next_rung is for a ladder of several resolutions; this stage has one")
        limits = rule.limits(len(resolutions), self.global_batch)
        if sum(limits) >= self.steps:
            raise ValueError(
                f"{name}: the samples of next_rung are {' + '.join(map(str, limits))} steps of {self.global_batch}, "
                f"which leaves none of its {self.steps} steps for {resolutions[-1]} px"
            )
        if rule.plateau is not None and rule.plateau.fewest > min(limits):
            raise ValueError(
                f"{name}: next_rung.plateau cannot end a rung before (window + patience) x every = "
                f"{rule.plateau.fewest} steps, and its samples end one after {min(limits)}"
            )
        return self


class Rung(_Training):
    """A stage at one resolution: what a job trains. `ladder`: all resolutions of the stage, if it has several."""

    resolution: Positive
    # Configs of earlier versions do not say.
    ladder: tuple[Positive, ...] = ()
    next_rung: NextRung | None = None

    @property
    def label(self) -> str:
        """The stage, and the rung where it has several, as `stage2@512`."""
        return f"{self.name}@{self.resolution}" if self.ladder else self.name

    @property
    def is_last(self) -> bool:
        return not self.ladder or self.resolution == self.ladder[-1]

    @property
    def limit(self) -> int | None:
        """Steps that the rung takes at most; None for the last, which ends with the stage."""
        return None if self.is_last else self._limits[self.ladder.index(self.resolution)]

    @property
    def span(self) -> tuple[int, int]:
        """The steps between which the rung lies if every one reaches its limit; a plateau may make both earlier."""
        begin = sum(self._limits[: self.ladder.index(self.resolution)]) if self.ladder else 0
        return begin, self.steps if self.limit is None else begin + self.limit

    @property
    def _limits(self) -> tuple[int, ...]:
        assert self.next_rung is not None, "a stage with a ladder has it"
        return self.next_rung.limits(len(self.ladder), self.global_batch)
