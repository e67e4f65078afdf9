"""YAML and dotted overrides -> checked config, with errors a person can act on."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from wemmu.config.files import replace_text
from wemmu.config.schema import Curriculum, StageRun

Schema = TypeVar("Schema", bound=BaseModel)


class ConfigError(ValueError):
    """A config that cannot be run; the message names the file, the field, the value and the reason."""


def load_curriculum(path: Path, overrides: Sequence[str] = ()) -> Curriculum:
    """Read a curriculum.

    `base: other.yaml` at its top, relative to the file, is read first, and the file's own `overrides: [...]` are
    applied to it before `overrides`. An override is a dotted assignment as `logging.every=5`;
    `stages.NAME.field=value` reaches into the stage called NAME, `stages.*.field=value` into all.

    Raises:
        ConfigError: if the file cannot be read or what comes out is not a valid curriculum.
    """
    return load(path, Curriculum, overrides)


def load_stage(path: Path) -> StageRun:
    """Read the config of one stage's job, as `dump` wrote it.

    Raises:
        ConfigError: if the file cannot be read or is not a valid stage.
    """
    return load(path, StageRun)


def dump(config: BaseModel, path: Path) -> None:
    """Write a config as YAML that `load_curriculum` or `load_stage` reads back equal; it appears whole."""
    replace_text(path, OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))))


def load(path: Path, schema: type[Schema], overrides: Sequence[str] = ()) -> Schema:
    """Read a config of any schema, as `load_curriculum` does.

    Raises:
        ConfigError: if the file cannot be read or is not valid.
    """
    try:
        tree = _read(Path(path))
        for override in overrides:
            _apply(tree, override)
        data = OmegaConf.to_container(tree, resolve=True)
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from error
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, e['loc'])) or schema.__name__}: {e['msg']} (got {_short(e['input'])})"
            for e in error.errors()
        ]
        raise ConfigError(f"the config {path} is not valid:\n" + "\n".join(lines)) from error


def _read(path: Path) -> DictConfig:
    tree = OmegaConf.load(path)
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"cannot read the config {path}: it must be a mapping of fields, not a list")
    base, overrides = tree.pop("base", None), tree.pop("overrides", [])
    if base is not None:
        own, tree = tree, _read(path.parent / base)
        tree.merge_with(own)
    for override in overrides:
        _apply(tree, override)
    return tree


def _apply(tree: DictConfig, override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator:
        raise ConfigError(f"the override {override!r} is not of the form field=value")
    parts = key.split(".")
    stages = [s.get("name") for s in tree.get("stages", [])]
    if parts[0] == "stages" and len(parts) > 1:
        wanted = range(len(stages)) if parts[1] == "*" else [i for i, name in enumerate(stages) if name == parts[1]]
        if not wanted:
            raise ConfigError(
                f"the override {override!r} names no stage; valid choices: {', '.join(map(str, stages))} or *"
            )
        keys = [".".join(["stages", str(i), *parts[2:]]) for i in wanted]
    else:
        keys = [key]
    parsed = OmegaConf.from_dotlist([f"value={value}"]).value
    for dotted in keys:
        OmegaConf.update(tree, dotted, parsed, merge=False)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
