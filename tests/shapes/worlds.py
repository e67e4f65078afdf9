"""Properties over many seeded draws from the world."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

# Drawn from seeds and not choice by choice: a split is met by rejection, of which hypothesis would see every try.
_draws = given(rng=st.integers(0, 2**32 - 1).map(random.Random))


def worlds(test):
    """Run a test for a hundred generators `rng`; the same ones every time, however slow the machine."""
    return settings(max_examples=100, deadline=None, derandomize=True, database=None)(_draws(test))
