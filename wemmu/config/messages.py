"""What to say of a config that is not valid: where, which value, why, and what to write instead."""

import re
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from typing_extensions import is_typeddict

from wemmu.readable import meant, valid

# Kinds of pydantic's errors: an unknown value, another value than fields or a list.
_UNKNOWN = ("literal_error", "enum", "union_tag_invalid")
# Kinds of files, by a field that no other kind has.
_KINDS = {
    "stages": "a curriculum, which `wemmu run CURRICULUM` takes",
    "stage_index": "the config of one stage, which `wemmu train` takes",
    "ranks_per_node": "a cluster file, which `wemmu submit CURRICULUM --cluster FILE` takes",
}
_OTHER_FORM = (
    *("model_type", "model_attributes_type", "union_tag_not_found"),
    *("dict_type", "mapping_type", "tuple_type", "list_type"),
)


def faults(error: ValidationError, schema: type[BaseModel], data: Any) -> list[str]:
    """A line for each error, without those that only follow from others; data: what was validated."""
    return [_line(e, schema, data) for e in _causes(error, schema)]


def other_kind(schema: type[BaseModel], data: Any) -> str:
    """Return what a file of another kind is; empty if `data` has a field by which its kind is this one or unknown."""
    marks = [mark for mark in _KINDS if mark in data]
    return "" if not marks or any(mark in schema.model_fields for mark in marks) else _KINDS[marks[0]]


def _line(error: ErrorDetails, schema: type[BaseModel], data: Any) -> str:
    # An invalid name of a field is the key itself, and a name of a type is none of a field.
    union = _union(error, schema) or ()
    loc = tuple(part for i, part in enumerate(error["loc"]) if part != "[key]" and (not union or i != len(union)))
    words = _words({**error, "loc": loc}, schema, data)
    # Not a whole mapping whose fields do not fit each other, nor a word that the message has.
    told = error["type"] in ("missing", "union_tag_invalid", "union_tag_not_found") or error["loc"][-1:] == ("[key]",)
    silent = told or (error["type"] == "value_error" and isinstance(error["input"], Mapping))
    given = "" if silent else f" (got {short(error['input'])})"
    return f"{'.'.join(map(str, loc)) or schema.__name__}: {words}{given}"


def _causes(error: ValidationError, schema: type[BaseModel]) -> list[ErrorDetails]:
    """The errors without those that only follow from others.

    A list is empty because its elements are not valid; a field is missing because its name is misspelt; of a union
    every type has an error, of which the deepest is of the type that was meant.
    """
    found = error.errors()
    deeper = [e["loc"] for e in found]
    misspelt = {
        (*e["loc"][:-1], *meant(e["loc"][-1], _fields(schema, e["loc"][:-1])))
        for e in found
        if e["type"] == "extra_forbidden"
    }
    unions = [_union(e, schema) for e in found]

    def follows(e: ErrorDetails, union: tuple[int | str, ...] | None) -> bool:
        loc = e["loc"]
        below = any(len(d) > len(loc) and d[: len(loc)] == loc for d in deeper)
        beside = [d for d, other in zip(deeper, unions, strict=True) if union is not None and other == union]
        inside = [d for d in beside if union is not None and len(d) > len(union) + 1]
        return (
            (e["type"] == "too_short" and below)
            or (e["type"] == "missing" and loc in misspelt)
            or bool(beside and loc not in (inside or beside[:1]))
        )

    return [e for e, union in zip(found, unions, strict=True) if not follows(e, union)]


def _union(error: ErrorDetails, schema: type[BaseModel]) -> tuple[int | str, ...] | None:
    """Where a union is whose types are in the error's `loc`, one element later; None if it has none."""
    if error["type"] == "extra_forbidden" or error["loc"][-1:] == ("[key]",):
        return None
    ways = (error["loc"][:i] for i in range(len(error["loc"])))
    return next((loc for i, loc in enumerate(ways) if not any(_types(schema, error["loc"][: i + 1]))), None)


def _words(error: ErrorDetails, schema: type[BaseModel], data: Any) -> str:
    loc, kind, about = error["loc"], error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        fields = _fields(schema, loc[:-1])
        close = meant(loc[-1], fields)
        words = f"unknown field; {f'did you mean {close[0]}?' if close else valid('', fields)}"
        if loc[0] == "stages" and len(loc) > 1 and isinstance(name := data["stages"][loc[1]].get("name"), str):
            words += f" (stage {name})"
        return words
    if kind in _UNKNOWN:
        choices = re.findall(r"'([^']*)'", about.get("expected_tags") or about["expected"])
        word = about.get("tag", error["input"])
        choices += ["true", "false"] if bool in _types(schema, loc) else []
        return f"unknown {f'kind {word!r}' if 'tag' in about else 'value'}; {valid(word, choices)}"
    form = _form(list(_types(schema, loc)), error["input"], str(loc[-1]) if loc else "")
    if kind == "union_tag_not_found" and isinstance(error["input"], Mapping):
        return f"the field kind is missing; {form}"
    if kind == "missing":
        return f"Field required; it {form}" if form else "Field required"
    return form if kind in _OTHER_FORM and form else error["msg"].removeprefix("Value error, ")


def _form(types: Sequence[Any], given: object, field: str) -> str:
    """What a field of one of these types must be, with an example; empty for a plain value."""
    members = [one for one in types if _inside(one) or get_origin(one) in (dict, list, tuple, Mapping)]
    if not members:
        return ""
    kinds = {kind: member for member in members for kind in _kinds(member)}
    # `recipe: ross` for `recipe: {kind: ross}`.
    close = meant(given, kinds) if isinstance(given, str) else []
    chosen = kinds[close[0]] if close else members[0]
    told = f" ({valid('', kinds, 'valid kinds')})" if kinds else ""
    what = "list" if get_origin(chosen) in (list, tuple) else "mapping"
    return f"must be a {what}, e.g. {_example(chosen, field, *close)}{told}"


def _example(annotation: Any, field: str, own_kind: str = "") -> str:
    """A short value of a type, as YAML says it; own_kind: its field `kind`."""
    one = _members(annotation)[0]
    inside = [part for part in get_args(one) if part is not Ellipsis]
    if fields := _inside(one):
        required = [] if is_typeddict(one) else [n for n, about in one.model_fields.items() if about.is_required()]
        named = dict.fromkeys([*(["kind"] if _kinds(one) else ()), *required]) or list(fields)[:1]
        values = {name: _example(fields[name], name) for name in named}
        values |= {"kind": own_kind} if own_kind else {}
        return f"{{{', '.join(f'{name}: {value}' for name, value in values.items())}}}"
    if get_origin(one) is Literal:
        return str(inside[0]).lower() if isinstance(inside[0], bool) else str(inside[0])
    if get_origin(one) in (dict, Mapping):
        return f"{{{_example(inside[0], field)}: {_example(inside[1], field)}}}"
    if get_origin(one) in (list, tuple):
        return f"[{', '.join(_example(part, field) for part in inside)}]"
    if isinstance(one, type) and issubclass(one, Enum):
        return str(next(iter(one)).value)
    return {bool: "true", int: "64", float: "0.1"}.get(one, f"my-{field}")


def _members(annotation: Any) -> list[Any]:
    """The types of a union, without None; of another type, itself."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for one in get_args(annotation) for member in _members(one) if member is not type(None)]
    return [annotation]


def _inside(one: Any) -> dict[str, Any]:
    """The types of the fields of a model or a TypedDict, by name; empty for another type."""
    if is_typeddict(one):
        return {name: kind for name, kind in get_type_hints(one).items() if not name.startswith("_")}
    models = isinstance(one, type) and issubclass(one, BaseModel)
    return {name: about.annotation for name, about in one.model_fields.items()} if models else {}


def _kinds(one: Any) -> tuple[str, ...]:
    """The values of the field `kind`, by which a union is told apart."""
    return get_args(_inside(one).get("kind"))


def _fields(schema: Any, loc: Sequence[str | int]) -> dict[str, None]:
    """Return the names of the fields at `loc` inside a type, in order."""
    return {name: None for one in _types(schema, loc) for name in _inside(one)}


def _types(annotation: Any, loc: Sequence[str | int]) -> Iterator[Any]:
    """Yield the types at `loc` inside a type, which contains the kind of a discriminated union as an element."""
    for one in _members(annotation):
        fields = _inside(one)
        if not loc:
            yield one
        elif loc[0] in fields:
            yield from _types(fields[str(loc[0])], loc[1:])
        elif fields:
            yield from _types(one, loc[1:]) if loc[0] in _kinds(one) else ()
        elif get_origin(one) in (dict, Mapping) or (get_origin(one) in (list, tuple) and isinstance(loc[0], int)):
            for inside in get_args(one):
                yield from _types(inside, loc[1:])


def short(value: object) -> str:
    """The value in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
