"""Turns signals into a flag that the loop reads once per step."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType

from wemmu.command_line import SAVED, reaches

# SIGHUP: the terminal is closed.
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class StopFlag:
    """Set by SIGINT, SIGTERM, SIGHUP or SIGUSR1; `reason` names the signal. A second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.reason: str | None = None
        for number in _STOPPING:
            # Under `nohup` a closed terminal is to change nothing.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._set)

    def _set(self, number: int, _: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def tell(self, words: str) -> None:
        """Print a line; if the reader of the output has ended, this is a signal, too."""
        if not reaches(f"{words}\n", sys.stdout):
            self.reason = self.reason or signal.SIGPIPE.name

    @contextmanager
    def ends_process(self, doing: str) -> Iterator[None]:
        """End the process with SAVED on a signal within the block, or on one that came before it.

        For waits inside libraries, during which Python calls no handlers. There must be nothing to save.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)

        def wait() -> None:
            for number in iter(lambda: os.read(reader, 1), b""):
                if number[0] in _STOPPING:
                    _end_process(signal.Signals(number[0]).name, doing)

        before = signal.set_wakeup_fd(writer)
        thread = Thread(target=wait, daemon=True)
        thread.start()
        try:
            if self.reason is not None:
                _end_process(self.reason, doing)
            yield
        finally:
            signal.set_wakeup_fd(before)
            os.close(writer)
            thread.join()
            os.close(reader)


def _end_process(reason: str, doing: str) -> None:
    print(f"stopped by {reason} while {doing}; there was nothing to save", file=sys.stderr, flush=True)
    # Not `sys.exit`, which would wait for the library.
    os._exit(SAVED)
