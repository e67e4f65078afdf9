"""What the signals of a system ask of training."""

import signal
import subprocess
import sys

import pytest

ASKED = "import os, signal; from wemmu.training.signals import StopFlag; stop = StopFlag(); os.kill(os.getpid(), {}); "


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("ignored", [False, True], ids=["in a terminal", "under nohup"])
def test_a_signal_asks_training_to_stop_but_a_closed_terminal_not_under_nohup(number: signal.Signals, ignored: bool):
    begin = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_{'IGN' if ignored else 'DFL'}); "
    command = [sys.executable, "-c", begin + ASKED.format(number) + "print(stop.reason)"]
    said = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert (said.returncode, said.stdout.strip()) == (
        0,
        "None" if ignored and number == signal.SIGHUP else number.name,
    ), said.stderr
