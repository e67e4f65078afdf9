"""What every part of a config has in common."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator

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


def _local(path: Path, info: ValidationInfo) -> Path:
    """`path` with the home directory in the place of `~`; found again where its config's own folder is known.

    `info.context` lists the folders that a relative path of the file may be meant from, the likeliest first.
    """
    try:
        path = path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"the home directory of {path} cannot be told; give the whole path") from error
    if path.is_absolute() or not info.context:
        return path
    there = [Path(folder) / path for folder in info.context]
    return _as_seen_from_here(next((p for p in there if p.exists()), there[0]))


def _as_seen_from_here(path: Path) -> Path:
    """One spelling of a path: relative to the working directory if it lies below."""
    full, here = Path(os.path.abspath(path)), Path.cwd()
    return full.relative_to(here) if full.is_relative_to(here) else full


def _local_or_url(path: str, info: ValidationInfo) -> str:
    if "://" in path or "::" in path:
        return path
    # A wildcard matches nothing as a name, so of these the folder before it decides.
    literal = Path(*(parts := Path(path).parts)[: next((i for i, p in enumerate(parts) if set("*?[") & set(p)), None)])
    found = _local(literal, info)
    return path if found == literal else str(found / Path(path).relative_to(literal))


# A path as a config names it: `~` is the home directory, a relative one is meant from where the command runs, or, in a
# run folder, from where the run was begun.
LocalPath = Annotated[Path, AfterValidator(_local)]
# The same, or a URL that fsspec opens; it may hold wildcards.
Location = Annotated[str, AfterValidator(_local_or_url)]
