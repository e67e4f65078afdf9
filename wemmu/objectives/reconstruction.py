"""ROSS: reconstruct an image from the states of its tokens. One loss per image, or per answer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from wemmu.config.objectives import Metric
from wemmu.timesteps import alpha_bar


def add_noise(z_0: Tensor, eps: Tensor, t: Tensor, timesteps: int) -> Tensor:
    """Compute z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps; z_0, eps: [M, ...], t: int64 [M]."""
    # The copy does not wait for what the device has still to do.
    share = alpha_bar(timesteps).to(t.device, non_blocking=True)[t].reshape(-1, *[1] * (z_0.ndim - 1))
    return share.sqrt().to(z_0.dtype) * z_0 + (1 - share).sqrt().to(z_0.dtype) * eps


def regression(predicted: Tensor, target: Tensor, metric: Metric) -> Tensor:
    """Compute the distance of two images [M, C, h, w], the mean over an image's elements: [M], float32.

    `cosine` is 1 - cos of the C channels at each place.
    """
    predicted, target = predicted.float(), target.float()
    match metric:
        case "mse":
            each = (predicted - target).square()
        case "smooth_l1":
            each = F.smooth_l1_loss(predicted, target, reduction="none")
        case "cosine":
            each = 1 - F.cosine_similarity(predicted, target, dim=1)
    return each.flatten(1).mean(1)


def answer_cross_entropy(
    logits: Tensor, targets: Tensor, sample: Tensor, samples: int, per_sample: float | None = None
) -> Tensor:
    """Compute the cross-entropy of each sample's answer, the mean over its tokens: float32 [samples].

    per_sample: divide the sums over the tokens by this number instead, the mean number of tokens of an answer in the
    global batch; then the mean over that batch is the mean over its tokens.
    logits: [T, vocabulary] of the target tokens, int64 [T]; sample: int64 [T], the sample of each token.
    """
    each = F.cross_entropy(logits.float(), targets, reduction="none")
    sums = each.new_zeros(samples).index_add(0, sample, each)
    if per_sample is not None:
        return sums / per_sample
    # Not `bincount`, for whose result the host waits.
    return sums / sums.new_zeros(samples).index_add(0, sample, torch.ones_like(each)).clamp(min=1)
