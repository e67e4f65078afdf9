"""`wemmu config`: check a curriculum, show the source of each value."""

import json
import math
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

import typer
import yaml

from wemmu.command_line import AsJson, Overrides, plainly, program, start
from wemmu.config import shipped
from wemmu.config.base import ConfigError, leaves
from wemmu.config.load import load_traced
from wemmu.config.schema import Curriculum
from wemmu.diagnosis.preflight import random_parts, unused_options

Source = Annotated[Path, typer.Argument(metavar="CURRICULUM", help="Curriculum in YAML, or a run folder.")]


@plainly()
def show(source: Source, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print every field and where its value comes from.

    That is a file, its overrides, --set or the default. `--set` accepts every printed line.
    """
    config, origins = load_traced(_file(source), Curriculum, overrides or ())
    _warn(config)
    names = [stage.name for stage in config.stages]
    # An older form of a config has other fields for the same.
    given = dict(leaves(config.model_dump(mode="json", exclude_defaults=True)))
    rows = [
        {
            "field": _in_stage(field, names),
            "value": value,
            "from": origins.get(field, "another field" if field in given else "default"),
        }
        for field, value in leaves(config.model_dump(mode="json"))
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        typed = f"{row['field']}={_as_typed(row['value'])}"
        print(f"{typed:<60}  # {row['from']}")


@plainly()
def check(
    sources: Annotated[list[Path], typer.Argument(metavar="CURRICULUM...", help="Curricula, or run folders.")],
    overrides: Overrides = None,
) -> None:
    """Check the fields of curricula.

    Exits with 78 if one is invalid. `wemmu run --dry-run` also checks backbones and data.
    """
    faults = []
    for source in sources:
        try:
            config, _ = load_traced(_file(source), Curriculum, overrides or ())
        except ConfigError as error:
            faults.append(str(error))
            continue
        _warn(config)
        print(f"{source}: valid, stages {', '.join(stage.name for stage in config.stages)}")
    if faults:
        raise ConfigError("\n".join(faults))


@plainly()
def listed(as_json: AsJson = False) -> None:
    """List the configs of this installation.

    Their names, such as shapes/demo.yaml, work in every folder.
    """
    found = [{"name": name, "file": str(file), "about": about} for name, file, about in shipped.configs()]
    lines = [f"{row['name']:<32} {shorten(row['about'], 86, placeholder=' ...')}" for row in found]
    print(json.dumps(found, indent=1) if as_json else "\n".join([f"in {shipped.HOME / 'configs'}:", *lines]))


def _warn(config: Curriculum) -> None:
    for check in (random_parts, unused_options):
        if (found := check(config)).status == "warning":
            typer.echo(f"warning: {found.words}", err=True)


def _file(source: Path) -> Path:
    return file if (file := source / "curriculum.yaml").is_file() else source


def _in_stage(field: str, names: list[str]) -> str:
    """`stages.0.steps` -> `stages.NAME.steps`, as an override says it."""
    parts = field.split(".")
    return ".".join([parts[0], names[int(parts[1])], *parts[2:]]) if parts[0] == "stages" else field


def _as_typed(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    # YAML ends a scalar with a line of dots.
    return text.removesuffix("...\n").strip()


app = program(show, check, help="Check or show a curriculum; list the installed ones.")
app.command("list")(listed)

if __name__ == "__main__":
    start(app)
