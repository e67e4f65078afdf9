"""The names of a user's module -> the canonical names of this system, by a table of prefixes."""

from collections.abc import Iterable, Mapping

# In the place of a new prefix: all that begins with the old one is left out.
LEFT_OUT = "-"


def parse_table(entries: Iterable[str]) -> dict[str, str]:
    """`OLD=NEW` -> {OLD: NEW}; see `rename`.

    Raises:
        ValueError: if an entry is none, or names a prefix twice.
    """
    table: dict[str, str] = {}
    for entry in entries:
        old, equals, new = entry.partition("=")
        if not equals or old in table:
            raise ValueError(f"--rename {entry!r} is no OLD=NEW with a new OLD; an example: model.bridge.=bridge.")
        table[old] = new
    return table


def rename(names: Iterable[str], table: Mapping[str, str]) -> dict[str, str | None]:
    """Name -> canonical name, None where the table leaves it out. The longest prefix counts; none leaves the name.

    A rule leaves out what begins with OLD if NEW is `-`; any other NEW takes the place of OLD.

    Raises:
        ValueError: if two names become one, or a rule fits no name.
    """
    found: dict[str, str | None] = {}
    taken: dict[str, str] = {}
    used = set()
    for name in names:
        fitting = max((old for old in table if name.startswith(old)), key=len, default=None)
        if fitting is None:
            new: str | None = name
        else:
            used.add(fitting)
            new = None if table[fitting] == LEFT_OUT else table[fitting] + name.removeprefix(fitting)
        if new is not None and taken.setdefault(new, name) != name:
            raise ValueError(f"--rename makes {new} of both {taken[new]} and {name}")
        found[name] = new
    if idle := sorted(table.keys() - used):
        raise ValueError(f"--rename {idle[0]}=... fits no name; the first are {', '.join(list(found)[:3])}")
    return found
