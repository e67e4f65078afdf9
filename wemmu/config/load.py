"""YAML and dotted overrides -> validated config, with errors that say what to change."""

import io
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from wemmu.config import shipped
from wemmu.config.base import ConfigError, Named, leaves, local_path, say_once
from wemmu.config.exported import completed
from wemmu.config.files import check_yaml, replace_text
from wemmu.config.messages import faults, other_kind, short
from wemmu.config.schema import Curriculum, StageRun
from wemmu.config.upgrade import MOVED, moved, upgraded_file
from wemmu.readable import meant, namesake, valid

Schema = TypeVar("Schema", bound=BaseModel)


def load_curriculum(path: Path, overrides: Sequence[str] = ()) -> Curriculum:
    """Read a curriculum.

    `base: other.yaml`, relative to the file, is read first; then the file's `overrides: [...]` apply, then `overrides`.
    An override is a dotted assignment as `logging.every=5`; `stages.NAME.field=value` changes the stage NAME,
    `stages.*.field=value` all stages.

    Raises:
        ConfigError: if the file cannot be read or the result is not a valid curriculum.
    """
    return load(path, Curriculum, overrides)


def load_stage(path: Path) -> StageRun:
    """Read the config of one stage's job that `dump` wrote.

    Raises:
        ConfigError: if the file cannot be read or is not a valid stage.
    """
    return load(path, StageRun)


def load_stages(run: Path) -> list[tuple[Path, StageRun]]:
    """Return the stages of a run folder in order, each with its folder; print and skip those with an invalid config.

    One stage's edited config must not make the others unusable.
    """
    found = []
    for file in sorted(run.glob("*/config.yaml")):
        try:
            found.append((file.parent, load_stage(file)))
        except ConfigError as error:
            print(f"skipping {file.parent}: {error}", file=sys.stderr)
    return sorted(found, key=lambda pair: pair[1].stage_index)


def dump(config: BaseModel, path: Path) -> None:
    """Write a config atomically as YAML that `load_curriculum` or `load_stage` reads back equal.

    `relative_to` records the working directory, from which relative paths start: absolute, and relative to the file's
    folder, so that a run folder or a whole checkout can be moved.
    """
    here, folder = os.path.abspath(Path.cwd()), os.path.abspath(path.parent)
    tree = {**config.model_dump(mode="json"), "relative_to": [here, os.path.relpath(here, folder)]}
    replace_text(path, OmegaConf.to_yaml(OmegaConf.create(tree)))


def _near(path: Path, schema: type[BaseModel]) -> str:
    """Return which file may be meant by one that is not there: shipped under this name, beside it, or shipped."""
    if schema is StageRun:
        return "; the config of a stage is RUN/STAGE/config.yaml"
    names = [name for name, _, _ in shipped.configs()]
    same = [name for name in names if Path(name).name == path.name]
    near = [*same, *namesake(path, path.parent.glob("*.yaml")), *meant(path, names)]
    return f"; did you mean {near[0]}?" if near else "; `wemmu config list` lists the configs of this installation"


def load(path: Path, schema: type[Schema], overrides: Sequence[str] = ()) -> Schema:
    """Read a config of any schema, like `load_curriculum`.

    Relative paths are searched beside the file that names them, then in the working directory; in a file of `dump`, in
    the recorded folder.

    Raises:
        ConfigError: if the file cannot be read or is not valid.
    """
    return load_traced(path, schema, overrides)[0]


def load_traced(path: Path, schema: type[Schema], overrides: Sequence[str] = ()) -> tuple[Schema, dict[str, str]]:
    """Load a config as `load` does; also return dotted name -> file or override for each field that is set."""
    given, path = path, shipped.config_file(Path(path))
    if path != Path(given):
        say_once(f"{given} is the one of this installation, {path}")
    try:
        tree, origins = _read(path)
        for override in overrides:
            origins |= dict.fromkeys(_apply(tree, override), Origin("--set"))
        data = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except ConfigError:
        raise
    except FileNotFoundError as error:
        raise ConfigError(
            f"cannot read the config {path}: there is no {error.filename}{_near(Path(error.filename), schema)}"
        ) from error
    except IsADirectoryError as error:
        inside = path / ("config.yaml" if schema is StageRun else "curriculum.yaml")
        give, run = (inside, f" {shlex.quote(str(path))}") if inside.is_file() else ("a YAML file", "")
        if schema is not Curriculum:
            raise ConfigError(f"{path} is a folder; give {give}") from error
        raise ConfigError(f"{path} is a folder; give {give}, or continue a run with `wemmu resume{run}`") from error
    except (OSError, UnicodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from error
    try:
        origins = {name: _origin(origins, name) for name, _ in leaves(data)}
        data, origins = _with_export(data, origins)
        config = schema.model_validate(_with_folders(data, origins))
        return config, {name: origin.source for name, origin in origins.items()}
    except ValidationError as error:
        if kind := other_kind(schema, data):
            raise ConfigError(f"{path} is {kind}") from error
        lines = [f"  {line}" for line in faults(error, schema, data)]
        raise ConfigError(f"the config {path} is not valid:\n" + "\n".join(lines)) from error


def _folders(written: Sequence[str] | None, path: Path) -> tuple[Path, ...]:
    """Return the folders in which relative paths of a config are searched; new files go to the last one.

    For a file of `dump`, this is the recorded folder; if the file was moved, first the folder that moved along; if both
    are gone, the working directory.
    """
    if written is None:
        return (path.parent, Path.cwd())
    then, from_file = Path(written[0]), Path(os.path.abspath(path.parent / written[1]))
    if then == from_file:
        return (then,)
    return (from_file, then, Path.cwd(), then if then.is_dir() else Path.cwd())


class Origin(NamedTuple):
    """The origin of a field, and the folders in which it is searched if it is a path."""

    source: str
    folders: tuple[Path, ...] = ()


def _read(path: Path, above: tuple[Path, ...] = ()) -> tuple[DictConfig, dict[str, Origin]]:
    """Return the tree of a file with its `base`, and the origin of each leaf; `above`: the files based on it."""
    if path.resolve() in above:
        raise ConfigError(f"cannot read the config {path}: its chain of `base` contains itself")
    tree = _parse(path)
    base, overrides, written = (tree.pop(key, None) for key in ("base", "overrides", "relative_to"))
    content: Any = OmegaConf.to_container(tree)
    try:
        content, old = upgraded_file(content)
    except ValueError as error:
        raise ConfigError(f"the config {path} is not valid: {error}") from error
    if old:
        tree = OmegaConf.create(content)
        # A run folder's file has every field, of all recipes in an earlier version, and nobody wrote it by hand.
        if written is None and not old.keys() >= MOVED.keys():
            for field in old:
                print(f"{path}: the field `{field}` has moved, write {old[field]}; it is read as that", file=sys.stderr)
    folders = _folders(written, path)
    origins = {name: Origin(str(path), folders) for name, _ in leaves(OmegaConf.to_container(tree))}
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"cannot read the config {path}: base must be the path of one file, got {base}")
        own, (tree, below) = tree, _read(path.parent / base, (*above, path.resolve()))
        tree.merge_with(own)
        origins = below | origins
    if not isinstance(overrides, ListConfig) and overrides:
        raise ConfigError(f"cannot read the config {path}: overrides must be a list of field=value, got {overrides}")
    for override in overrides or ():
        origins |= dict.fromkeys(_apply(tree, str(override)), Origin(f"{path} (overrides)", folders))
    return tree, origins


def _origin(origins: Mapping[str, Origin], name: str) -> Origin:
    # What is in a list comes with it; an interpolation brings leaves that the file does not name.
    while name and name not in origins:
        name = name.rpartition(".")[0]
    return origins.get(name, Origin("an older form"))


def _with_export(data: Any, origins: dict[str, Origin]) -> tuple[Any, dict[str, Origin]]:
    """Return the tree completed by the pipeline that `export` names, with the origins of what it says."""
    if not isinstance(data.get("export"), str):
        return data, origins
    export = local_path(Named.of(data["export"], origins["export"].folders))
    try:
        whole = completed(data, export)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    # Its paths start where this process does.
    said = Origin(str(export), (Path.cwd(),))
    return whole, {name: origins.get(name, said) for name, _ in leaves(whole)}


def _with_folders(value: Any, origins: Mapping[str, Origin], name: str = "") -> Any:
    """Return the tree with strings that know the folders of relative paths."""
    if isinstance(value, dict):
        return {k: _with_folders(v, origins, f"{name}.{k}" if name else str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_folders(v, origins, f"{name}.{i}" if name else str(i)) for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value
    folders = _origin(origins, name).folders
    # The miniature's files are wherever this program is, for a config that somebody copied, too.
    if value.startswith(shipped.ASSETS) and (shipped.HOME / value).exists():
        folders = (*(folders or (Path.cwd(),)), shipped.HOME)
    return Named.of(value, folders)


def _parse(path: Path) -> DictConfig:
    """Return the YAML text of a file.

    Raises:
        ConfigError: names the line that is not UTF-8, or holds a number that YAML reads as another one.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"cannot read the config {path}: line {line} is not UTF-8 ({error.reason}: byte "
            f"0x{data[error.start]:02x}); save the file as UTF-8"
        ) from error
    stream = io.StringIO(text)
    # YAML's own errors name the line.
    stream.name = str(path)
    check_yaml(f"cannot read the config {path}", stream)
    stream.seek(0)
    tree = OmegaConf.load(stream)
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"cannot read the config {path}: it must be a mapping of fields, not a list")
    return tree


def _apply(tree: DictConfig, override: str) -> list[str]:
    """Apply an override; return the leaves that it sets."""
    key, separator, value = override.partition("=")
    if not separator:
        raise ConfigError(f"the override {override!r} is not of the form field=value")
    key = moved(key)
    parts = key.split(".")
    listed = tree.get("stages") or []
    stages = [s.get("name") for s in listed if isinstance(s, DictConfig)] if isinstance(listed, ListConfig) else []
    if parts[0] == "stages" and len(parts) > 1:
        numbers = range(len(stages)) if parts[1] == "*" else [i for i, name in enumerate(stages) if name == parts[1]]
        if not numbers:
            raise ConfigError(
                f"the override {override!r} names an unknown stage; {valid(parts[1], [*stages, '*'], 'valid choices')}"
            )
        keys = [".".join(["stages", str(i), *parts[2:]]) for i in numbers]
    else:
        keys = [key]
    try:
        check_yaml(f"the override {short(override)} cannot be applied", value)
        parsed: Any = OmegaConf.from_dotlist([f"value={value}"]).value
        for dotted in keys:
            OmegaConf.update(tree, dotted, parsed, merge=False)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"the override {short(override)} cannot be applied: {error}") from error
    plain: Any = OmegaConf.to_container(parsed) if isinstance(parsed, DictConfig | ListConfig) else parsed
    return [name for name, _ in leaves(dict.fromkeys(keys, plain))]
