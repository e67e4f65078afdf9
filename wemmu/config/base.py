"""The base class and field types of all configs."""

import math
import os
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# Bounds of what can be meant: beyond them memory, threads or the range of float32 end, far from the field at fault.
Positive = Annotated[int, Field(gt=0, le=10**12)]
Count = Annotated[int, Field(ge=0, le=10**12)]
SidePx = Annotated[int, Field(gt=0, le=2**16)]
MOST_SOLVER_STEPS, LARGEST_GUIDANCE = 10_000, 1000
SolverSteps = Annotated[int, Field(gt=0, le=MOST_SOLVER_STEPS)]
Guidance = Annotated[float, Field(ge=-LARGEST_GUIDANCE, le=LARGEST_GUIDANCE)]
_LARGEST = 1e12
# Seeds derived by counting up must also fit the 64 bits of torch's generators.
Seed = Annotated[int, Field(ge=-(2**62), le=2**62)]
Share = Annotated[float, Field(ge=0, le=1)]


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted name and value of every field of a nested config; of lists of configs, fields by number, too."""
    nested = isinstance(value, list | tuple) and any(isinstance(one, Mapping | list | tuple) for one in value)
    inside = value.items() if isinstance(value, Mapping) else enumerate(value) if nested else ()
    if not inside:
        yield name, value
    for key, one in inside:
        yield from leaves(one, f"{name}.{key}" if name else str(key))


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], folders: tuple[str, str] = ("", "")
) -> Iterator[tuple[str, Any, Any]]:
    """Yield dotted name, value before and value now of every field that differs between two nested configs.

    Relative paths are from `folders`. Two spellings of one path are equal.
    """
    old, new = dict(leaves(before)), dict(leaves(now))
    for field in {**old, **new}:
        values = old.get(field, "absent"), new.get(field, "absent")
        if values[0] != values[1] and len({repr(_whole(*each)) for each in zip(values, folders, strict=True)}) > 1:
            yield field, *values


def _whole(value: Any, folder: str) -> Any:
    if isinstance(value, list | tuple):
        return [_whole(one, folder) for one in value]
    return os.path.normpath(os.path.join(folder, value)) if isinstance(value, str) else value


class ConfigError(ValueError):
    """An invalid config; the message names the file, the field, the value and the reason."""


def not_default(config: "Config", *fields: str) -> list[str]:
    """Return those of the fields that have another value than their default."""
    return [field for field in fields if getattr(config, field) != type(config).model_fields[field].default]


class Config(BaseModel):
    """An immutable config that rejects unknown fields, non-finite numbers, and booleans in place of numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _usual_numbers(cls, values: Any) -> Any:
        # YAML reads yes, on and true as booleans, which pydantic converts to 1 in a number field.
        for name, value in values.items() if isinstance(values, dict) else ():
            known = cls.model_fields.get(name)
            if known is not None and _holds_switch(value) and not _mentions_bool(known.annotation):
                raise ValueError(f"{name} is {value}: a boolean (true, yes, on), but must be a number or text")
            if known is not None and any(hasattr(rule, "le") for rule in known.metadata):
                # Its own bound names the field.
                continue
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, float) and math.isfinite(number) and abs(number) > _LARGEST:
                    raise ValueError(f"{name} is {number:g}; no number of a config is above {_LARGEST:g}")
        return values

    def changed(self, fields: Mapping[str, Any]) -> Self:
        """Return a copy with other values of these fields, dotted name -> value, which are not validated."""
        copy = self
        for name, value in fields.items():
            first, _, rest = name.partition(".")
            new = getattr(copy, first).changed({rest: value}) if rest else value
            copy = copy.model_copy(update={first: new})
        return copy


def _holds_switch(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_switch, value.values()))
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_holds_switch, value)))


def _mentions_bool(annotation: Any) -> bool:
    """Whether the annotation contains a boolean; nested configs check their own fields."""
    if isinstance(annotation, type) and issubclass(annotation, bool | BaseModel):
        return True
    return annotation is Any or any(map(_mentions_bool, get_args(annotation)))


class Named(str):
    """A string of a config with the folders in which a relative path is searched.

    The first folder that holds the path counts, otherwise the last. Two folders are the file's own and the working
    directory.
    """

    folders: tuple[Path, ...] = ()

    @classmethod
    def of(cls, text: str, folders: tuple[Path, ...]) -> "Named":
        named = cls(text)
        named.folders = folders
        return named


def local_path(value: str) -> Path:
    """Return the path for a string of a config. Raises ValueError if there is no home directory for `~`."""
    return Path(_local(value))


def _local(value: Any) -> Any:
    """Expand `~` and search a relative path in its folders; return other values unchanged."""
    if not isinstance(value, str | Path):
        return value
    if "://" in str(value):
        raise ValueError(f"{value} is a URL, but this must be a path on this machine (data.remote may be a URL)")
    path, folders = Path(value), value.folders if isinstance(value, Named) else ()
    try:
        path = path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: there is no home directory; give an absolute path") from error
    if path.is_absolute() or not folders:
        return path
    there = [Path(os.path.abspath(folder / path)) for folder in folders]
    chosen = next((p for p in there if p.exists()), there[-1])
    if len(there) > 1 and there[0] != there[1] and all(p.exists() for p in there[:2]):
        say_once(
            f"{path} means the one beside the config, {there[0]}, not {there[1]}; give an absolute path to change that"
        )
    return _as_seen_from_here(chosen)


@cache
def say_once(sentence: str) -> None:
    """Print a note on stderr."""
    print(f"note: {sentence}", file=sys.stderr)


def _as_seen_from_here(full: Path) -> Path:
    """Return one spelling of a path: relative to the working directory if it lies below."""
    here = Path.cwd()
    return full.relative_to(here) if full.is_relative_to(here) else full


def _local_or_url(value: Any) -> Any:
    if not isinstance(value, str) or "://" in value or "::" in value:
        return value
    # A wildcard is not a name, so search the folder before it.
    parts = Path(value).parts
    literal = Path(*parts[: next((i for i, p in enumerate(parts) if set("*?[") & set(p)), None)])
    named = Named.of(str(literal), value.folders if isinstance(value, Named) else ())
    found = _local(named)
    return value if found == literal else str(found / Path(value).relative_to(literal))


# A path in a config. `~` is the home directory. A relative path is searched beside the file that names it first, so a
# folder with a config and its data works from everywhere and can be moved; then in the working directory, as the
# configs of this repository need. Not in the other order: a file in the working directory must not change what a
# config means.
LocalPath = Annotated[Path, BeforeValidator(_local)]
# The same, or a URL that fsspec opens; it may hold wildcards.
Location = Annotated[str, BeforeValidator(_local_or_url)]
