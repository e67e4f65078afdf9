"""How tests wait for what other processes do."""

import time
from collections.abc import Callable


def eventually(
    holds: Callable[[], object],
    shown: Callable[[], object] = lambda: "",
    *,
    seconds: float = 60.0,
    every: float = 0.02,
) -> None:
    """Wait until it holds, asking every so many seconds; after `seconds` fail the test with what is `shown` by then."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"what the test waits for never happened: {shown()}"
        time.sleep(every)
