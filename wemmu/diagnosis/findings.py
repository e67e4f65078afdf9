"""Findings, and the runner of checks: a check that fails is a finding, and secrets are removed."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """warning: training runs, but not as well as it could. problem: a part that the user needs will fail."""

    name: str
    status: Status
    found: str
    remedy: str | None = None

    @property
    def words(self) -> str:
        return f"{self.name}: {self.found}\n    -> {self.remedy}"


# A check and its arguments.
Call = tuple[Any, ...]

_SECRET_NAMES = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)
# Shorter values are switches ("true", "1"); removing them would garble every text.
_SHORTEST_SECRET = 8
# Credentials before the @ of a URL, and signatures in its query.
_IN_URLS = (
    (re.compile(r"(://)[^/\s@]+@"), r"\1***@"),
    (re.compile(r"([?&][^=\s&]*(?:sig|token|key|secret|credential)[^=\s&]*=)[^&\s]+", re.IGNORECASE), r"\1***"),
)


def examine(check: Callable[..., Finding], *arguments: object) -> Finding:
    """Return what the check finds; if it raises, a problem that names it and the error."""
    try:
        finding = check(*arguments)
    # Libraries that are broken also exit.
    except (Exception, SystemExit) as error:
        finding = Finding(
            check.__name__.replace("_", " "),
            "problem",
            f"the check {check.__name__}{_told(arguments)} crashed: {type(error).__name__}: {error}",
            "read the error: a library or the check is broken; if it is the check, report it",
        )
    return replace(finding, found=redact(finding.found), remedy=finding.remedy and redact(finding.remedy))


def redact(text: str) -> str:
    """Return `text` without the values of environment variables named like secrets, and without secrets in URLs."""
    secrets = {v for name, v in os.environ.items() if _SECRET_NAMES.search(name) and len(v) >= _SHORTEST_SECRET}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    for pattern, instead in _IN_URLS:
        text = pattern.sub(instead, text)
    return text


def short(error: BaseException | str, characters: int = 300) -> str:
    """Return an error on one line; keeps its end, where libraries say what is wrong."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    line = " ".join(text.split())
    return line if len(line) <= characters else "..." + line[-characters:]


def _told(arguments: tuple[object, ...]) -> str:
    # Longer arguments (a whole curriculum) would hide the error.
    words = ", ".join(str(one) for one in arguments if len(str(one)) <= 80)
    return f" of {words}" if words else ""
