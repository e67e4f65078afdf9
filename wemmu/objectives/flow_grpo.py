"""Flow-GRPO (arXiv 2505.05470): stochastic steps of a sampler are actions, and normal distributions score them.

With these log-probabilities the loss is the clipped one of `wemmu.objectives.grpo`, one action for each step. They are
means over the elements of x, as in the published code, so ratios stay near 1 at any resolution and the clip range is
1e-4 instead of 0.2.
"""

import math

from torch import Tensor


def log_probability(x: Tensor, mean: Tensor, std: float) -> Tensor:
    """Compute log N(x; mean, std^2) as the mean over elements: [N, ...] -> float32 [N]."""
    elements = -(x.float() - mean.float()).square() / (2 * std**2) - math.log(std) - math.log(2 * math.pi) / 2
    return elements.flatten(1).mean(1)


def divergence(mean: Tensor, reference: Tensor, std: float) -> Tensor:
    """Compute KL(N(mean, std^2) || N(reference, std^2)) as the mean over elements: [N, ...] -> float32 [N].

    It is (mean - reference)^2 / (2 std^2), in closed form, whatever was sampled. Published code leaves the step's |dt|
    out of std^2 and so has a value of |dt| times this one; its beta of 0.04 is about 0.004 here.
    """
    return (mean.float() - reference.float()).square().flatten(1).mean(1) / (2 * std**2)
