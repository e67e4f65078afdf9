"""Rewrites the YAML text of a config of an earlier version with today's fields; keeps comments and layout."""

import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml
from yaml import MappingNode, Node, ScalarNode, SequenceNode

from wemmu.config.files import YAML_LOADER
from wemmu.config.upgrade import MOVED, RENAMED, moved, recipe_kind, upgraded_file


class _Edit(NamedTuple):
    start: int
    end: int
    text: str


def rewritten(text: str) -> str:
    """Return the text with today's fields; the same text if it has no other.

    Raises:
        ValueError: if the file gives a field under both names, or in a form that cannot be edited as text.
    """
    tree, root = yaml.load(text, YAML_LOADER), yaml.compose(text, YAML_LOADER)
    if not isinstance(tree, dict) or not isinstance(root, MappingNode):
        raise ValueError("it must be a mapping of fields")
    if "recipe" in tree and (both := [name for name in MOVED if name in tree]):
        raise ValueError(f"it has the field `recipe` and, of an earlier version, `{both[0]}`; move the latter by hand")
    for edit in sorted(_edits(text, tree, root), reverse=True):
        text = text[: edit.start] + edit.text + text[edit.end :]
    expected, _ = upgraded_file(tree)
    overrides = [_override(str(one)) for one in tree.get("overrides") or ()]
    if yaml.load(text, YAML_LOADER) != expected | ({"overrides": overrides} if overrides else {}):
        raise ValueError(f"its fields {', '.join(MOVED)} are written in a way that only a person can move")
    return text


def _edits(text: str, tree: dict[str, Any], root: MappingNode) -> Iterator[_Edit]:
    for old, new in RENAMED.items():
        for key in _keys(root, old.split(".")):
            yield _Edit(key.start_mark.index, key.end_mark.index, new)
    fields = {key.value: (key, value) for key, value in root.value}
    _, overrides = fields.get("overrides", (None, None))
    for one in overrides.value if isinstance(overrides, SequenceNode) else ():
        place = slice(one.start_mark.index, one.end_mark.index)
        yield _Edit(place.start, place.stop, text[place].replace(one.value, _override(one.value), 1))
    kind = recipe_kind(tree)
    for name in MOVED.keys() & fields.keys():
        key, value = fields[name]
        end = _end(text, value)
        is_used = (name == "reconstruction") == (kind == "ross")
        yield _Edit(key.start_mark.index, end, _recipe(text, kind, key, value, end) if is_used else "")


def _override(text: str) -> str:
    name, equals, value = text.partition("=")
    return f"{moved(name)}{equals}{value}"


def _keys(node: Node, path: list[str]) -> Iterator[ScalarNode]:
    """The nodes of the keys at a path of `RENAMED`."""
    first, *rest = path
    if isinstance(node, SequenceNode) and first == "*":
        for one in node.value:
            yield from _keys(one, rest)
    for key, value in node.value if isinstance(node, MappingNode) else ():
        if key.value == first:
            yield from _keys(value, rest) if rest else (key,)


def _end(text: str, value: Node) -> int:
    """Where a value ends; PyYAML's mark of a block lies behind the comments that follow it."""
    lines = text[: value.end_mark.index].splitlines(keepends=True)
    if isinstance(value, MappingNode) and not value.flow_style:
        while not lines[-1].strip() or lines[-1].startswith("#"):
            lines.pop()
    return len("".join(lines).rstrip("\n"))


def _recipe(text: str, kind: str, key: Node, value: Node, end: int) -> str:
    """The field `bridge` or `reconstruction` as the field `recipe`."""
    inside, written = kind == "wemmu", text[value.start_mark.index : end]
    if not isinstance(value, MappingNode):
        return f"recipe: {{kind: {kind}}}"
    if value.flow_style:
        rest = f"bridge: {written}}}" if inside else written[1:].lstrip()
        return f"recipe: {{kind: {kind}{', ' if inside or value.value else ''}{rest}"
    # The rest of the key's line may be a comment; the first field stands in a line below.
    block = text[key.end_mark.index : end]
    if inside:
        return f"recipe:\n  kind: {kind}\n" + textwrap.indent(f"bridge{block}", "  ")
    head, _, body = block.partition("\n")
    return f"recipe{head}\n{' ' * value.start_mark.column}kind: {kind}\n{body}"
