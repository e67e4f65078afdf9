"""The base of what stages minimise, and the settings of `wemmu.objectives`, where OPEN facts of papers are argued."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from wemmu.config.base import Config, SidePx

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
    mean: Annotated[float, Field(ge=-10, le=10)] = 0.0
    std: Annotated[float, Field(gt=0, le=10)] = 1.0
    shift: Annotated[float, Field(ge=1e-3, le=1e3)] = 3.0
    reference_resolution: SidePx = 1024
    resolution_exponent: Annotated[float, Field(ge=-4, le=4)] = 1.0

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
    """The base of the configs that `objective:` chooses from, by their `kind`; the config.py of a recipe has its own.

    titles: kind -> what a stage with it does, on a page. pairs: whether the loss compares each sample with another one
    of the global batch, which the loader then adds as `Batch.negatives`.
    """

    kind: str

    titles: ClassVar[Mapping[str, str]]

    @property
    def pairs(self) -> bool:
        return False

    @property
    def unused(self) -> Mapping[str, str]:
        """The fields with another value than their default that the other fields switch off -> the reason."""
        return {}
