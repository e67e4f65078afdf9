"""What is drawn when: even mixtures and exact epochs, from a seed and a count alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wemmu.data.mixture import permute, sample_indices, schedule

WEIGHTS = st.lists(st.floats(0.01, 5.0), min_size=1, max_size=7)


@settings(deadline=None)
@given(WEIGHTS, st.integers(0, 10**6))
def test_after_any_number_of_draws_the_mixture_matches_its_weights(weights: list[float], seed: int) -> None:
    draws = 600
    stream, _ = schedule(weights, draws, str(seed))
    shares = np.array(weights) / sum(weights)
    taken = np.cumsum(stream[:, None] == np.arange(len(weights)), axis=0)
    due = np.arange(1, draws + 1)[:, None] * shares
    assert (np.abs(taken - due) <= 1 + shares * len(weights) + 1e-9).all()


@settings(deadline=None)
@given(WEIGHTS, st.integers(0, 10**6))
def test_nth_counts_the_draws_before(weights: list[float], seed: int) -> None:
    stream, nth = schedule(weights, 200, str(seed))
    for k in range(len(weights)):
        assert nth[stream == k].tolist() == list(range((stream == k).sum()))


@settings(deadline=None)
@given(WEIGHTS, st.integers(1, 300))
def test_a_longer_schedule_continues_a_shorter_one(weights: list[float], draws: int) -> None:
    short, long = schedule(weights, draws, "seed"), schedule(weights, 300, "seed")
    assert all(np.array_equal(a, b[:draws]) for a, b in zip(short, long, strict=True))


def test_seeds_give_other_orders_of_the_same_mixture() -> None:
    orders = {tuple(schedule([0.2, 0.3, 0.5], 50, f"seed {s}")[0]) for s in range(10)}
    assert len(orders) > 5


@settings(deadline=None)
@given(st.integers(1, 3000), st.text(max_size=5))
def test_permute_is_a_permutation(size: int, seed: str) -> None:
    assert sorted(permute(np.arange(size), size, seed)) == list(range(size))


def test_permute_sends_every_index_everywhere() -> None:
    """Uniform over places, and neighbours are parted as often as by chance (both to five standard deviations)."""
    size, seeds = 10, 4000
    images = np.array([permute(np.arange(size), size, str(seed)) for seed in range(seeds)])
    expected, deviation = seeds / size, (seeds / size * (1 - 1 / size)) ** 0.5
    for index in range(size):
        assert np.abs(np.bincount(images[:, index], minlength=size) - expected).max() < 5 * deviation
    follows = (np.diff(images, axis=1) == 1).sum()
    pairs = seeds * (size - 1)
    assert abs(follows - pairs / size) < 5 * (pairs / size) ** 0.5


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 4))
def test_every_sample_once_in_every_epoch(size: int, epochs: int) -> None:
    drawn = sample_indices(size, 0, size * epochs, "seed").reshape(epochs, size)
    assert all(sorted(epoch) == list(range(size)) for epoch in drawn)


def test_epochs_are_shuffled_differently() -> None:
    drawn = sample_indices(50, 0, 150, "seed").reshape(3, 50).tolist()
    assert len({tuple(epoch) for epoch in [*drawn, range(50)]}) == 4


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 100), st.integers(1, 30))
def test_any_part_of_the_sequence_can_be_read_alone(size: int, start: int, count: int) -> None:
    whole = sample_indices(size, 0, start + count, "seed")
    assert np.array_equal(sample_indices(size, start, count, "seed"), whole[start:])


@pytest.mark.parametrize("size", [2**33])
def test_a_huge_stream_costs_nothing(size: int) -> None:
    drawn = sample_indices(size, 5 * size - 4, 8, "seed")
    assert len(set(drawn.tolist())) == 8
    assert drawn.max() > 2**31
