"""What the wildcards and braces of a path stand for: one answer for those who read the files and those who look."""

import glob
import itertools
import re
from collections.abc import Callable

# {000..127} and {a,b}
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")


def expanded(path: str) -> list[str]:
    """The paths that braces stand for, as a shell and WebDataset read them."""
    braces = _BRACES.search(path)
    if braces is None:
        return [path]
    first, last, listed = braces.groups()
    if listed is None:
        choices = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    else:
        choices = listed.split(",")
    before, after = path[: braces.start()], path[braces.end() :]
    return list(itertools.chain.from_iterable(expanded(before + choice + after) for choice in choices))


def escaped(path: str, exists: Callable[[str], bool]) -> str:
    """`path` with the brackets of folders that have them in their names meant as they stand."""
    escaped, literal = [], []
    for name in path.split("/"):
        literal.append(name)
        as_it_stands = "[" in name and exists("/".join(literal))
        escaped.append(glob.escape(name) if as_it_stands else name)
    return "/".join(escaped)
