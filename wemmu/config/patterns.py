"""Expands the wildcards and braces of a path; readers and checks share this rule."""

import glob
import itertools
import re
from collections.abc import Callable

# {000..127} and {a,b}
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")


def expanded(path: str) -> list[str]:
    """Return the paths of a brace expression, as in a shell and in WebDataset."""
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
    """Return `path` with the brackets of existing folders escaped."""
    escaped, literal = [], []
    for name in path.split("/"):
        literal.append(name)
        as_it_stands = "[" in name and exists("/".join(literal))
        escaped.append(glob.escape(name) if as_it_stands else name)
    return "/".join(escaped)
