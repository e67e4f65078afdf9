"""How checks are run, and the programs that they call."""

import time

import pytest

from wemmu.diagnosis.commands import answer
from wemmu.diagnosis.findings import Finding, examine, redact


def breaks(what: str) -> Finding:
    raise LookupError(f"no {what}")


def leaves() -> Finding:
    raise SystemExit("a library gave up")


def test_a_check_that_fails_itself_is_a_problem_that_names_it_and_the_error():
    found = examine(breaks, "anvil")
    assert found.status == "problem"
    assert "breaks of anvil crashed: LookupError: no anvil" in found.found
    assert found.remedy
    assert "a library gave up" in examine(leaves).found


def test_secrets_of_the_environment_and_of_urls_are_struck_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("SOME_TOKEN", "true")
    text = "got 0123456789abcdef at s3://me:pass@store/x?X-Sig-Token=abc&part=3, true"
    assert redact(text) == "got *** at s3://***@store/x?X-Sig-Token=***&part=3, true"
    assert "0123456789abcdef" not in examine(breaks, "0123456789abcdef").found


def test_a_program_that_hangs_is_ended_with_its_children():
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"sh did not answer within 0\.5 s"):
        # The shell's child holds the pipe open.
        answer(["sh", "-c", "sleep 600; echo never"], timeout_s=0.5)
    assert time.monotonic() - started < 60


def test_what_a_program_says_comes_back_with_its_code():
    code, output = answer(["sh", "-c", "echo out; echo err >&2; exit 3"], timeout_s=60)
    assert (code, output.splitlines()) == (3, ["out", "err"])
