"""Conditional and contrastive flow matching. An objective takes a velocity field and returns one loss per sample."""

import torch
from torch import Tensor

from wemmu.objectives.path import sample_path
from wemmu.timesteps import VelocityField


def _square_error(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).float().square().flatten(1).mean(1)


def flow_matching(velocity: VelocityField, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """|| v_theta(x_t, t, y) - (eps - x_0) ||^2, the mean over a sample's elements. Returns [B]."""
    x_t, t, v = sample_path(x_0, eps, t)
    return _square_error(velocity(x_t, t), v)


def contrastive_flow_matching(
    velocity: VelocityField, x_0: Tensor, eps: Tensor, t: Tensor, negative: Tensor, weight: float
) -> Tensor:
    """|| v_theta - v+ ||^2 - lambda || v_theta - v- ||^2 with v- = eps' - x_0' of sample `negative[b]`. Returns [B].

    negative: int64 [B], an index into the batch (`negatives`); b itself means that there is none, and the second term
    is left out. weight: lambda.
    """
    x_t, t, v = sample_path(x_0, eps, t)
    predicted = velocity(x_t, t)
    has_negative = negative != torch.arange(len(negative), device=negative.device)
    return _square_error(predicted, v) - weight * has_negative * _square_error(predicted, v[negative])


def negatives(sample_ids: Tensor) -> Tensor:
    """For each sample the index of another one: that of the next id in cyclic order. int64 [B] -> int64 [B].

    The choice depends on who is in the batch and not on the order in which they stand. A small stream can put a sample
    into a batch twice; it is never its own negative, and one that is all there is gets its own index.

    Raises:
        ValueError: for a batch of one, which has no other sample.
    """
    if len(sample_ids) < 2:
        raise ValueError("the contrastive objective needs at least two samples in a micro-batch")
    ids, rank = torch.unique(sample_ids, return_inverse=True)
    # Where each id stands for the first time.
    place = torch.arange(len(sample_ids), device=sample_ids.device)
    first = place.new_full((len(ids),), len(place)).scatter_reduce_(0, rank, place, "amin")
    return first[(rank + 1) % len(ids)] if len(ids) > 1 else place
