"""Group-relative policy optimisation (GRPO): rewards of groups -> advantages -> a loss per sequence of tokens.

For one input the policy samples a group of G sequences y_i, each with one reward R_i. With r_it the ratio
pi(y_it | ...) / pi_old(y_it | ...):

    A_i = (R_i - mean R) / (std R + epsilon)
    l_it = -min(r_it A_i, clip(r_it, 1 - low, 1 + high) A_i) + beta k3_it        (arXiv 2402.03300)
"""

import torch
from torch import Tensor

from wemmu.config.objectives import Aggregate, Scale, Std


def advantages(rewards: Tensor, scale: Scale, std: Std = "unbiased", epsilon: float = 1e-4) -> Tensor:
    """Compute advantages [B, G] of rewards [B, G], float32; rows are groups. Rewards that are NaN are ignored.

    scale: divide by the standard deviation of each `group`, of the whole `batch` (arXiv 2508.08221), or not at all:
    `none` (Dr. GRPO, arXiv 2503.20783). std: `unbiased` divides the squares by n - 1, `population` by n.
    A group whose rewards are all equal has advantages of exactly 0, whatever rounding does to its mean.

    Raises:
        ValueError: if a group has one sequence only, which nothing can be compared with.
    """
    if rewards.shape[1] < 2:
        raise ValueError(f"a group needs at least 2 sequences to compare, got {rewards.shape[1]}")
    exact, known = rewards.double(), ~rewards.isnan()
    count = known.sum(1, keepdim=True)
    mean = exact.where(known, 0.0).sum(1, keepdim=True) / count.clamp(min=1)
    difference = (exact - mean).where(known & ~_constant(exact, known)[:, None], 0.0)
    if scale == "none":
        return difference.float()
    if scale == "group":
        deviation = _std(difference.square().sum(1, keepdim=True), count, std)
    else:
        all_known = exact[known]
        about = all_known - all_known.mean() if all_known.numel() else all_known
        deviation = _std(about.square().sum(), known.sum(), std)
    return (difference / (deviation + epsilon)).float()


def _constant(rewards: Tensor, known: Tensor) -> Tensor:
    """Which groups have one reward only: bool [B]."""
    infinity = float("inf")
    return rewards.where(known, -infinity).amax(1) <= rewards.where(known, infinity).amin(1)


def _std(squares: Tensor, count: Tensor, std: Std) -> Tensor:
    return (squares / (count - int(std == "unbiased")).clamp(min=1)).sqrt()


def surrogate(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, low: float, high: float, delta: float | None = None
) -> Tensor:
    """Compute the clipped loss of each token, -min(r A, clip(r, 1 - low, 1 + high) A): [N, T], float32.

    logp, logp_old: [N, T] of the sampled tokens; advantage: [N], of their sequences. delta: cap on the ratio of tokens
    with a negative advantage, whose loss is otherwise unbounded (arXiv 1912.09729).
    With one update per rollout logp_old is logp without its gradient: the ratio is 1 and the loss is -A, but the
    gradient is -A d logp.
    """
    ratio, advantage = (logp - logp_old).exp(), advantage[:, None]
    clipped = ratio.clamp(1 - low, 1 + high)
    free = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.minimum(free * advantage, clipped * advantage)


def clipped(logp: Tensor, logp_old: Tensor, advantage: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return which tokens have no gradient because their ratio is below or above the clip range: two bool [N, T]."""
    ratio, advantage = (logp - logp_old).exp(), advantage[:, None]
    return (ratio < 1 - low) & (advantage < 0), (ratio > 1 + high) & (advantage > 0)


def kl_k3(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """Compute k3 = exp(q - p) - (q - p) - 1 per token, p = logp, q = logp_ref: at least 0, on average KL(pi || ref).

    As a loss its gradient on the policy's own samples is that of KL(ref || pi).
    """
    difference = logp_ref - logp
    return difference.exp() - difference - 1


def aggregate(each: Tensor, mask: Tensor, kind: Aggregate, limit: int, mean_length: float) -> Tensor:
    """Reduce token losses [N, T] to one value per sequence, [N]; its mean over all sequences of a step is the loss.

    grpo: the mean over a sequence's tokens. dr_grpo: their sum over `limit`, the longest sequence there can be, so that
    long bad sequences are not spared (arXiv 2503.20783). dapo: their sum over `mean_length`, the mean number of tokens
    of all sequences of the step, on all ranks: together the mean over all tokens (arXiv 2503.14476).
    """
    sums = (each * mask).sum(1)
    match kind:
        case "grpo":
            return sums / mask.sum(1).clamp(min=1)
        case "dr_grpo":
            return sums / limit
        case "dapo":
            return sums / mean_length
