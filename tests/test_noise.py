"""Noise is a function of what it is for, not of who draws it."""

from collections.abc import Iterator

import pytest
import torch

from wemmu.noise import WORTH_A_THREAD, Noise


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


def test_samples_steps_and_purposes_have_numbers_of_their_own():
    here = Noise(0, 1, torch.tensor([4])).normal("eps", (16,))
    others = [
        Noise(1, 1, torch.tensor([4])).normal("eps", (16,)),
        Noise(0, 2, torch.tensor([4])).normal("eps", (16,)),
        Noise(0, 1, torch.tensor([5])).normal("eps", (16,)),
        Noise(0, 1, torch.tensor([4])).normal("queries", (16,)),
    ]
    assert not any(torch.equal(here, other) for other in others)
