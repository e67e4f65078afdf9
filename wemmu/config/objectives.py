"""What a stage minimises. Where a paper is silent (facts marked OPEN), the default is argued beside the field."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from wemmu.config.base import Config, Positive, Share

Metric = Literal["mse", "cosine", "smooth_l1"]
Aggregate = Literal["grpo", "dr_grpo", "dapo"]
Scale = Literal["group", "batch", "none"]
Std = Literal["unbiased", "population"]
SDE = Literal["flow", "constant", "cps"]


class TimeSampling(Config):
    """Distribution of t in training (t = 1 is noise). OPEN in the paper; Sana's own: logit-normal, shift 3.

    t ~ sigmoid(N(mean, std^2)), then t <- s t / (1 + (s - 1) t) with s = `shift` at `reference_resolution`, scaled by
    (resolution / reference_resolution) ** `resolution_exponent`: the signal-to-noise ratio of an image grows with its
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

    answers: `sample`: the mean over an answer's tokens, then over the global batch, so a short answer weighs as much as
    a long one; `token`: the sum over all tokens of the global batch by their number. The reconstruction is the mean
    over all images of the global batch. None of them depends on how samples share the devices.
    """

    kind: Literal["reconstructive"]
    weight: Annotated[float, Field(ge=0)] = 1.0
    answers: Literal["sample", "token"] = "sample"


class CaptionTuning(Config):
    """Cross-entropy of captions that the data set has: the mean over a caption's tokens, then over the batch."""

    kind: Literal["caption"]


class UnifiedGRPO(Config):
    """UAE: GRPO over captions, rewarded by what a frozen generator reconstructs from them (arXiv 2509.09666 v5).

    See `wemmu.objectives.grpo` for the formulas. The paper names group 4, temperature 1 and beta 1e-6; the other
    defaults are ours or the field's, argued beside them.
    """

    kind: Literal["unified_grpo"]
    # Captions of each image.
    group: Annotated[int, Field(ge=2)] = 4
    # Of sampling; log-probabilities are of the same distribution.
    temperature: Annotated[float, Field(gt=0)] = 1.0
    scale: Scale = "group"
    std: Std = "unbiased"
    epsilon: Annotated[float, Field(gt=0)] = 1e-4
    # OPEN in the paper, which cites GRPO. With dr_grpo and dapo a long caption is not spared for its length.
    aggregate: Aggregate = "grpo"
    # OPEN in the paper; PPO's. `clip_high` above it is DAPO's clip-higher; equal to `clip` if not given.
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: Annotated[float, Field(gt=0)] | None = None
    # Cap on the ratio of tokens with a negative advantage.
    delta: Annotated[float, Field(gt=1)] | None = None
    # Weight of k3, the distance from the policy that the stage began with. With 0 no copy of it is kept.
    beta: Annotated[float, Field(ge=0)] = 0.0
    # Optimizer steps for each rollout (mu). With 1 the ratio is 1, nothing is clipped, and the loss is about 0 although
    # its gradient is not.
    updates: Positive = 1

    @property
    def high(self) -> float:
        return self.clip if self.clip_high is None else self.clip_high

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.delta is not None and self.delta <= 1 + self.high:
            raise ValueError(f"objective.delta {self.delta} must be above the clip range, 1 + {self.high}")
        return self


class ColdStart(Config):
    """UAE, first stage of arXiv 2509.09666 v1: 1 - cosine of image and reconstruction, differentiated.

    The VLM's captions are sampled at `temperature`; no gradient goes through the choice of words. The gradient reaches
    the DiT through the last steps of the sampler, and the language model through the condition.
    """

    kind: Literal["cold_start"]
    temperature: Annotated[float, Field(gt=0)] = 1.0
    # Steps of the sampler that have a gradient, the last ones. OPEN in the paper; the released code takes all of 10.
    last: Positive = 1


class FlowGRPO(Config):
    """UAE, third stage of arXiv 2509.09666 v1: GRPO over the sampler's path, which moves the DiT (arXiv 2505.05470).

    The paper does not name the algorithm; this is the field's. For each image the VLM writes one caption, and the
    sampler draws a group of images from it: they begin with the same noise and differ by the stochastic steps of a
    window, see `wemmu.sampling.sde`. Defaults: Flow-GRPO and its fast variant.
    """

    kind: Literal["flow_grpo"]
    # Images drawn of each caption.
    group: Annotated[int, Field(ge=2)] = 8
    # Who wrote the captions: the VLM, or whoever wrote those of the data set.
    captions: Literal["policy", "data"] = "policy"
    # Of sampling captions.
    temperature: Annotated[float, Field(gt=0)] = 1.0
    sde: SDE = "flow"
    noise_level: Annotated[float, Field(gt=0, le=1)] = 0.7
    # The stochastic steps: `window` steps from step `first` on, of recipe.generator.steps. Other steps are Euler's.
    first: Annotated[int, Field(ge=0)] = 0
    window: Positive = 2
    scale: Scale = "group"
    std: Std = "population"
    epsilon: Annotated[float, Field(gt=0)] = 1e-4
    # Advantages are cut at plus and minus this.
    limit: Annotated[float, Field(gt=0)] = 5.0
    # Log-probabilities are means over latent elements, hence a small range.
    clip: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    # Weight of KL to the DiT that the stage began with. With 0 no copy of it is kept.
    beta: Annotated[float, Field(ge=0)] = 0.0
    # Optimizer steps for each rollout, as in UnifiedGRPO.
    updates: Positive = 1
