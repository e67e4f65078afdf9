"""`wemmu config`: check a curriculum, show the source of each value, upgrade a file of an earlier version."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from wemmu.command_line import AsJson, Overrides, UsageError, plainly, program, start
from wemmu.config.base import ConfigError, leaves
from wemmu.config.files import replace_text
from wemmu.config.load import load_traced
from wemmu.config.rewrite import rewritten
from wemmu.config.schema import Curriculum

Source = Annotated[Path, typer.Argument(metavar="CURRICULUM", help="Curriculum in YAML, or a run folder.")]


@plainly()
def show(source: Source, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print every field of a curriculum as `--set` takes it, and what it comes from: a file, an override, a default."""
    config, origins = load_traced(_file(source), Curriculum, overrides or ())
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
    """Check the fields of curricula; exits with 78 at the first that is wrong. `run --dry-run` looks at files, too."""
    for source in sources:
        config, _ = load_traced(_file(source), Curriculum, overrides or ())
        print(f"{source}: valid, stages {', '.join(stage.name for stage in config.stages)}")


@plainly()
def upgrade(
    source: Source,
    in_place: Annotated[bool, typer.Option("--in-place", help="Write over the file.")] = False,
    output: Annotated[Path | None, typer.Option(help="File to write, in the same folder.")] = None,
) -> None:
    """Rewrite a config of an earlier version with today's fields; comments stay.

    Without an option the result is NAME.upgraded.yaml beside the file.
    """
    file = _file(source)
    into = file if in_place else output or file.with_name(f"{file.stem}.upgraded.yaml")
    if in_place and output:
        raise UsageError("--in-place and --output exclude each other")
    if into.absolute().parent != file.absolute().parent:
        raise UsageError(f"--output {into} is in another folder; relative paths and `base` start at {file.parent}")
    if into.exists() and not in_place:
        raise UsageError(f"{into} exists; give another --output")
    text = file.read_text(encoding="utf-8-sig")
    try:
        new = rewritten(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot upgrade {file}: {error}") from error
    if new == text:
        print(f"{file} has no field of an earlier version; nothing was written")
        return
    replace_text(into, new)
    print(f"{into}: upgraded")


def _file(source: Path) -> Path:
    return source / "curriculum.yaml" if source.is_dir() else source


def _in_stage(field: str, names: list[str]) -> str:
    """`stages.0.steps` -> `stages.NAME.steps`, as an override says it."""
    parts = field.split(".")
    return ".".join([parts[0], names[int(parts[1])], *parts[2:]]) if parts[0] == "stages" else field


def _as_typed(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    # YAML ends a scalar with a line of dots.
    return text.removesuffix("...\n").strip()


app = program(show, check, upgrade, help="Check a curriculum, show where each value comes from, or upgrade it.")

if __name__ == "__main__":
    start(app)
