"""What is drawn when: even mixtures and exact epochs, from a seed and a count alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wemmu.data import mixture
from wemmu.data.mixture import Order, permute, schedule, window_bytes

WEIGHTS = st.lists(st.floats(0.01, 5.0), min_size=1, max_size=7)
SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=20)


# Windows of a sample, of some, of all.
WINDOWS = st.sampled_from([1, 10, 2**14])


@contextmanager
def windows_of(samples: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "WINDOW", samples)
        yield


@settings(deadline=None)
@given(WEIGHTS, st.integers(0, 10**6), st.integers(0, 500), st.integers(1, 500))
def test_every_beginning_and_every_stretch_match_the_weights(
    weights: list[float], seed: int, begin: int, length: int
) -> None:
    stream, nth = schedule(weights, begin + length, str(seed))
    shares = np.array(weights) / sum(weights)
    bound = 1 + shares * len(weights) + 1e-9
    taken = np.cumsum(stream[:, None] == np.arange(len(weights)), axis=0)
    due = np.arange(1, begin + length + 1)[:, None] * shares
    assert (np.abs(taken - due) <= bound).all()
    within = np.bincount(stream[begin:], minlength=len(weights))
    assert (np.abs(within - length * shares) <= 2 * bound).all()
    for k in range(len(weights)):
        assert nth[stream == k].tolist() == list(range((stream == k).sum())), "nth counts the draws before"


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


# ------------------------------------------------------------------------------------------------------------- order
@settings(deadline=None)
@given(WINDOWS, SIZES, st.integers(1, 4))
def test_every_sample_once_in_every_epoch(window: int, sizes: list[int], epochs: int) -> None:
    with windows_of(window):
        drawn = Order(sizes, "seed")(np.arange(sum(sizes) * epochs)).reshape(epochs, -1)
    assert all(sorted(epoch) == list(range(sum(sizes))) for epoch in drawn)


@pytest.mark.parametrize("window", [10, 2**14])
def test_epochs_and_seeds_are_shuffled_differently(window: int) -> None:
    with windows_of(window):
        drawn = [Order([7] * 9, seed)(np.arange(126)).reshape(2, 63).tolist() for seed in ("one", "two")]
    assert len({tuple(epoch) for epoch in [*drawn[0], *drawn[1], range(63)]}) == 5


@settings(deadline=None)
@given(WINDOWS, SIZES, st.lists(st.integers(0, 500), min_size=1, max_size=30))
def test_any_part_of_the_sequence_can_be_read_alone(window: int, sizes: list[int], positions: list[int]) -> None:
    order = Order(sizes, "seed")
    with windows_of(window):
        whole = order(np.arange(501))
        assert np.array_equal(order(np.array(positions)), whole[positions])


@settings(deadline=None)
@given(WINDOWS, st.lists(st.tuples(st.integers(1, 12), st.integers(1, 1000)), min_size=1, max_size=20))
def test_shards_are_needed_window_by_window(window: int, shards: list[tuple[int, int]]) -> None:
    """No shard is needed in two windows of an epoch, and those of one window have at most the bytes that are said."""
    sizes, shard_bytes = np.array(shards).T
    with windows_of(window):
        epoch = Order(sizes, "seed")(np.arange(sizes.sum()))
        most = window_bytes(sizes, shard_bytes)
    shard_of = np.searchsorted(np.cumsum(sizes), epoch, "right")
    last = {shard: place for place, shard in enumerate(shard_of)}
    needed: set[int] = set()
    for place, shard in enumerate(shard_of):
        needed.add(shard)
        assert shard_bytes[list(needed)].sum() <= most
        if max(last[shard] for shard in needed) == place:  # nothing of what came before comes again
            needed = set()
    assert most <= shard_bytes.sum()


def test_a_stream_in_one_window_is_shuffled_evenly() -> None:
    """Uniform over places, to five standard deviations."""
    seeds = 4000
    orders = np.array([Order([3, 1, 4, 2], str(seed))(np.arange(10)) for seed in range(seeds)])
    deviation = (seeds * 0.1 * 0.9) ** 0.5
    for place in range(10):
        assert np.abs(np.bincount(orders[:, place], minlength=10) - seeds / 10).max() < 5 * deviation


def test_a_huge_stream_costs_nothing() -> None:
    size = 2**33
    drawn = Order([size // 4] * 4, "seed")(np.arange(5 * size - 4, 5 * size + 4))
    assert len(set(drawn.tolist())) == 8
    assert drawn.max() > 2**31
