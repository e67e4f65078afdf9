"""Computes the samples of each step from seed and step alone, so the step is the data position."""

import hashlib
import random
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

# Samples that are shuffled together: many steps' worth, and few enough for a cache (1.5 GB at 512 px, JPEG).
WINDOW = 2**14


def schedule(weights: Sequence[float], draws: int, seed: str) -> tuple[Integers, Integers]:
    """Return which of K streams each draw takes, and how often that stream was drawn before: two int64 [draws].

    Draw j of a stream with share w of the weights comes due at time (j + phase) / w, and draws are taken in the order
    in which they come due. So the mixture is even and not random: after any m draws a stream has been taken w m times
    to within 1 + w K, and between any two draws to within twice that. Phases, in [0, 1), come from the seed. A longer
    schedule continues a shorter one.
    """
    shares = np.asarray(weights, dtype=np.float64) / sum(weights)
    rng = random.Random(f"{seed}/phases")
    due, stream, nth = [], [], []
    for k, share in enumerate(shares):
        # More than the stream can be taken, by the bound above.
        counts = np.arange(int(share * (draws + len(shares))) + 2)
        due.append((counts + rng.random()) / share)
        stream.append(np.full_like(counts, k))
        nth.append(counts)
    order = np.argsort(np.concatenate(due), kind="stable")[:draws]
    return np.concatenate(stream)[order], np.concatenate(nth)[order]


class Order:
    """The endless sequence of shuffled epochs of a stream; every epoch is another permutation of all its samples.

    The shards come in random order and are gathered into windows of about WINDOW samples, and the samples of a window
    are shuffled. So a reader that fetches shards from afar needs those of one window at a time; a stream that fits into
    a window is shuffled evenly.

    Args:
        sizes: number of samples in each shard.
        seed: of the shuffling.
    """

    def __init__(self, sizes: Sequence[int] | Integers, seed: str):
        self._sizes, self._seed = np.asarray(sizes, dtype=np.int64), seed
        self._begins = np.cumsum(self._sizes) - self._sizes
        self._size = int(self._sizes.sum())
        # Steps in order stay in one epoch and in one window: what was shuffled last is kept.
        self._whole = lru_cache(maxsize=4)(_whole)

    def __call__(self, positions: Integers) -> Integers:
        """Return the indices, int64 [P], of the samples at `positions`, int64 [P], of the sequence."""
        epochs = positions // self._size
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self._in_epoch(positions[here] % self._size, f"{self._seed}/epoch {epoch}")
        return indices

    def _in_epoch(self, positions: Integers, seed: str) -> Integers:
        # Shards in the order of this epoch, the positions that they take up, and the window in which each begins.
        shards = self._whole(len(self._sizes), f"{seed}/shards")
        ends = np.cumsum(self._sizes[shards])
        begins = ends - self._sizes[shards]
        windows = begins // WINDOW
        indices = np.empty_like(positions)
        window_of = windows[np.searchsorted(ends, positions, "right")]
        for window in np.unique(window_of):
            here = window_of == window
            first, last = np.searchsorted(windows, [window, window + 1])
            begin, end = int(begins[first]), int(ends[last - 1])
            moved = begin + self._permute(positions[here] - begin, end - begin, f"{seed}/window {window}")
            place = np.searchsorted(ends, moved, "right")
            indices[here] = self._begins[shards[place]] + moved - begins[place]
        return indices

    def _permute(self, index: Integers, size: int, seed: str) -> Integers:
        # A window is larger than this only where a single shard is huge.
        return self._whole(size, seed)[index] if size <= 2 * WINDOW else permute(index, size, seed)


def window_bytes(sizes: Integers, shard_bytes: Integers) -> int:
    """Return the largest number of bytes of the shards that a window of `Order` covers, for shard sizes [K] each."""
    # All but the last begin and end within WINDOW samples.
    most = WINDOW * (shard_bytes / sizes).max() + shard_bytes.max()
    return int(min(most, shard_bytes.sum()))


def _whole(size: int, seed: str) -> Integers:
    return permute(np.arange(size), size, seed)


def permute(index: Integers, size: int, seed: str) -> Integers:
    """Return where a pseudo-random permutation of range(size) maps each index: int64; cost grows with `index` alone.

    A Feistel network permutes the smallest even number of bits that holds `size`; what falls outside the range is
    sent on until it falls inside, which keeps it a permutation (Black and Rogaway 2002, "cycle walking").
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64(2**half - 1)
    keys = np.frombuffer(hashlib.blake2b(seed.encode(), digest_size=48).digest(), dtype="<u8")

    def network(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> np.uint64(half), x & mask
        for key in keys:
            left, right = right, left ^ (_scramble(right ^ key) & mask)
        return (left << np.uint64(half)) | right

    out = network(index.astype(np.uint64))
    while (outside := out >= size).any():
        out[outside] = network(out[outside])
    return out.astype(np.int64)


def _scramble(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64 bits in which every input bit moves every output bit (the last step of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
