"""Noise is a function of what it is for, not of who draws it."""

from collections.abc import Iterator

import pytest
import torch

from wemmu.noise import WORTH_A_THREAD, Noise
from wemmu.philox import philox


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_numbers_do_not_depend_on_the_number_of_threads(threads: None):
    noise, drawn = Noise(3, 5, torch.arange(6)), []
    for number in (1, 4):
        torch.set_num_threads(number)
        drawn.append((noise.normal("queries", (WORTH_A_THREAD,)), noise.uniform("time")))
    for one, other in zip(*drawn, strict=True):
        assert torch.equal(one, other)
    assert len(set(drawn[0][1].tolist())) == 6


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_words_that_its_authors_publish(counter: list[int], key: list[int], expected: list[int]):
    found = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [int(word) for word in found] == expected


def keyed(step: int, ids: list[int], seed: int = 0, source: str = "device") -> Noise:
    return Noise(seed, step, torch.tensor(ids), source=source)


@pytest.mark.parametrize("source", ["host", "device"])
def test_noise_is_keyed_by_seed_step_sample_and_purpose_and_not_by_the_batch(source: str):
    together = keyed(5, [4, 9, 2**40 + 7], source=source).normal("queries", (3, 5))
    for row, sample in zip(together, [4, 9, 2**40 + 7], strict=True):
        assert torch.equal(row, keyed(5, [sample], source=source).normal("queries", (3, 5))[0])
    here = keyed(1, [4], source=source).normal("eps", (16,))
    others = [keyed(*key, source).normal("eps", (16,)) for key in ((1, [4], 1), (2, [4], 0), (1, [4 + 2**32], 0))]
    others.append(keyed(1, [4], source=source).normal("queries", (16,)))
    assert not any(torch.equal(here, other) for other in others)
    assert keyed(1, [4, 5], source=source).uniform("time").shape == (2,)
    # The default on a CPU is the host's generator, whose numbers recorded runs have.
    assert torch.equal(keyed(1, [4], source="auto").normal("eps", (16,)), here) == (source == "host")


def test_noise_drawn_on_the_device_is_normal_and_uniform():
    noise = keyed(3, list(range(64)))
    normal, uniform = noise.normal("eps", (4001,)).double(), noise.uniform("time", (4001,)).double()
    n = normal.numel()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(normal.pow(power).mean() - expected) < 4 * (variance / n) ** 0.5
    assert 0 <= uniform.min() < 1e-4
    assert 1 - 1e-4 < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 4 * (1 / 12 / n) ** 0.5
    # Neighbours are independent, within a sample and between samples.
    flat = normal.flatten()
    for lag in (1, 2, 3, 4, 4001):
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 4 / n**0.5
