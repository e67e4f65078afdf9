"""What is drawn when: pure functions of a seed and a count, so that the place in the data is one number, the step."""

import hashlib
import random
from collections.abc import Sequence

import numpy as np


def schedule(weights: Sequence[float], draws: int, seed: str) -> tuple[np.ndarray, np.ndarray]:
    """Which of K streams each draw takes, and how often that stream was taken before: two int64 [draws].

    Draw j of a stream with share w of the weights comes due at time (j + phase) / w, and draws are taken in the order
    in which they come due. So the mixture is even and not random: after any m draws a stream has been taken w m times
    to within 1 + w K. Phases, in [0, 1), come from the seed. A longer schedule continues a shorter one.
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


def sample_indices(size: int, start: int, count: int, seed: str) -> np.ndarray:
    """Indices, int64 [count], at positions `start`... of the endless sequence of shuffled epochs of `size` samples.

    Every epoch is another permutation, in which every sample stands exactly once.
    """
    positions = np.arange(start, start + count)
    epochs = positions // size
    return np.concatenate(
        [permute(positions[epochs == epoch] % size, size, f"{seed}/epoch {epoch}") for epoch in np.unique(epochs)]
    )


def permute(index: np.ndarray, size: int, seed: str) -> np.ndarray:
    """Where a pseudo-random permutation of range(size) sends each index; int64, in time and memory of `index` alone.

    A Feistel network permutes the smallest even number of bits that holds `size`; what falls outside the range is
    sent on until it falls inside, which keeps it a permutation (Black and Rogaway 2002, "cycle walking").
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64(2**half - 1)
    keys = np.frombuffer(hashlib.blake2b(seed.encode(), digest_size=48).digest(), dtype="<u8")

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> np.uint64(half), x & mask
        for key in keys:
            left, right = right, left ^ (_scramble(right ^ key) & mask)
        return (left << np.uint64(half)) | right

    out = network(index.astype(np.uint64))
    while (outside := out >= size).any():
        out[outside] = network(out[outside])
    return out.astype(np.int64)


def _scramble(x: np.ndarray) -> np.ndarray:
    """A bijection of 64 bits in which every input bit moves every output bit (the last step of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
