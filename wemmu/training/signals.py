"""Signals become a flag that the loop reads once per step."""

import signal
from types import FrameType

# EX_TEMPFAIL: stopped on request with everything saved; the same command goes on.
EXIT_INTERRUPTED = 75
# EX_CONFIG: something is wrong that another attempt would find as wrong.
EXIT_FINAL = 78


class StopFlag:
    """Set by SIGINT, SIGTERM or SIGUSR1; `reason` says by which. A second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.reason: str | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._set)

    def _set(self, number: int, _: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name
