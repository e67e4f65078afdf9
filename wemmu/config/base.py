"""What every part of a config has in common."""

import os
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
# What counts from it on, too, must fit the 64 bits of torch's generators.
Seed = Annotated[int, Field(ge=-(2**62), le=2**62)]
Share = Annotated[float, Field(ge=0, le=1)]


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a nested config with their values, by dotted names."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class Config(BaseModel):
    """Immutable; refuses fields it does not know, numbers that are not finite, and yes or no for a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, values: Any) -> Any:
        # YAML reads yes, on and true as a switch, of which pydantic makes a 1 where a number belongs.
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            if field is not None and _holds_switch(value) and not _mentions_bool(field.annotation):
                raise ValueError(f"{name} is {value}: a switch (true, yes, on), where a number or a text is needed")
        return values


def _holds_switch(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_switch, value.values()))
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_holds_switch, value)))


def _mentions_bool(annotation: Any) -> bool:
    """Also of configs inside, which check their own fields."""
    if isinstance(annotation, type) and issubclass(annotation, bool | BaseModel):
        return True
    return annotation is Any or any(map(_mentions_bool, get_args(annotation)))


class Named(str):
    """A text of a config that knows the folders from which it may be meant, should it be a relative path.

    The first folder that has the path is meant, the last where none has. Two folders are that of the file itself and
    the working directory.
    """

    folders: tuple[Path, ...] = ()

    @classmethod
    def of(cls, text: str, folders: tuple[Path, ...]) -> "Named":
        named = cls(text)
        named.folders = folders
        return named


def _local(value: Any) -> Any:
    """A path with the home directory in the place of `~`, found where its config means it; else the value as it is."""
    if not isinstance(value, str | Path):
        return value
    path, folders = Path(value), value.folders if isinstance(value, Named) else ()
    try:
        path = path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"the home directory of {path} cannot be told; give the whole path") from error
    if path.is_absolute() or not folders:
        return path
    there = [Path(os.path.abspath(folder / path)) for folder in folders]
    chosen = next((p for p in there if p.exists()), there[-1])
    if len(there) == 2 and there[0] != there[1] and all(p.exists() for p in there):
        _say_once(
            f"{path} is the one beside the config, {there[0]}, and not {there[1]}; give a whole path to change that"
        )
    return _as_seen_from_here(chosen)


@cache
def _say_once(sentence: str) -> None:
    print(f"note: {sentence}", file=sys.stderr)


def _as_seen_from_here(full: Path) -> Path:
    """One spelling of a path: relative to the working directory if it lies below."""
    here = Path.cwd()
    return full.relative_to(here) if full.is_relative_to(here) else full


def _local_or_url(value: Any) -> Any:
    if not isinstance(value, str) or "://" in value or "::" in value:
        return value
    # A wildcard matches nothing as a name, so of these the folder before it decides.
    parts = Path(value).parts
    literal = Path(*parts[: next((i for i, p in enumerate(parts) if set("*?[") & set(p)), None)])
    named = Named.of(str(literal), value.folders if isinstance(value, Named) else ())
    found = _local(named)
    return value if found == literal else str(found / Path(value).relative_to(literal))


# A path as a config names it. `~` is the home directory. A relative path is first looked for beside the file that names
# it, so that a folder of a config and its data works from everywhere and can be moved; what is not there is meant from
# where the command runs, as the configs of this repository are, and as a path on a command line is. Not the other way
# round: what a config means must not change with a file that happens to lie where somebody stands.
LocalPath = Annotated[Path, BeforeValidator(_local)]
# The same, or a URL that fsspec opens; it may hold wildcards.
Location = Annotated[str, BeforeValidator(_local_or_url)]
