"""Numbers and lists as people read them."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path


def human(value: float, unit: str = "") -> str:
    """Format three digits and a decimal prefix: 7_509_000_000, "B" -> "7.51 GB"."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    while abs(value) >= 999.5 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{value:.3g} {prefixes[0]}{unit}".rstrip()


def duration(seconds: float) -> str:
    """Format seconds with units: 48 s, 12 min 05 s or 3 h 07 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def percent(share: float) -> str:
    """Format a share: 0.935 -> `93.5 %`; a narrow space keeps number and sign together."""
    return f"{100 * share:.1f}\u202f%"


def listed(words: Sequence[str]) -> str:
    """Join words: `a`, `a and b` or `a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def meant(word: object, choices: Iterable[object]) -> list[str]:
    """The choice that is most like a misspelt word; empty if none is like it."""
    known = {str(choice).lower(): str(choice) for choice in choices}
    return [known[one] for one in difflib.get_close_matches(str(word).lower(), known, n=1)]


def namesake(path: Path, others: Iterable[Path]) -> list[Path]:
    """Return the path whose name is most like; empty if none is. Folders in front would make all paths alike."""
    named = {other.name: other for other in others}
    return [named[name] for name in meant(path.name, named)]


def valid(words: object, choices: Iterable[object], label: str = "valid") -> str:
    """`did you mean heun? valid: euler, heun`, the end of a message about an unknown word, or about a list of them."""
    choices = list(choices)
    several = words if isinstance(words, list | tuple | set) else [words]
    close = list(dict.fromkeys(one for word in several for one in meant(word, choices)))
    question = f"did you mean {', '.join(close)}? " if close else ""
    return f"{question}{label}: {', '.join(map(str, choices)) or 'none'}"
