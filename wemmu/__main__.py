"""The console command `wemmu`, also `python -m wemmu`: one name for every program of this repository.

It knows programs by name and imports one when it is called, so help and completion are fast and this module depends on
no other folder.
"""

import sys
import tomllib
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand

from wemmu.command_line import Group, program, start


class Program(NamedTuple):
    """help: one line for the list. module, name: where its function or, of several commands, its Typer app is."""

    help: str
    module: str
    name: str = "main"


PROGRAMS = {
    "data": Program("Write and inspect the shards that training reads.", "data_pipeline.__main__", "app"),
    "config": Program("Check or show a curriculum; list the installed ones.", "wemmu.show_config", "app"),
    "plan": Program("Compute memory, FLOPs and hours of a curriculum.", "wemmu.plan"),
    "doctor": Program("Check this machine, and a curriculum.", "wemmu.doctor"),
    "run": Program("Run or resume a curriculum on this machine.", "launcher.cli", "run"),
    "submit": Program("Submit a curriculum to Slurm.", "launcher.cli", "submit"),
    "status": Program("Show the progress of each job of a run.", "launcher.cli", "status"),
    "logs": Program("Show the log of a job.", "launcher.cli", "logs"),
    "cancel": Program("Cancel the Slurm jobs of a run.", "launcher.cli", "cancel"),
    "resume": Program("Resume the unfinished jobs of a run, here or on Slurm.", "launcher.cli", "resume"),
    "train": Program("Train one stage.", "wemmu.train"),
    "sample": Program("Generate images from a run or an exported model.", "wemmu.sample"),
    "ui": Program("Start a page in the browser to try a model.", "wemmu.ui.__main__"),
    "evaluate": Program("Score a stage on held-out requests, or run a benchmark.", "wemmu.evaluate"),
    "compare": Program("Compare two result cards of a benchmark.", "wemmu.compare"),
    "export": Program("Export a diffusers pipeline, or convert other weights.", "tools.convert_ckpt"),
    "report": Program("Write the report of a run or the page of a stage.", "wemmu.report.__main__"),
}


class FrontDoor(Group):
    """Lists programs without importing them; imports the one that is called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = {name: TyperCommand(name, help=one.help) for name, one in PROGRAMS.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, stub, rest = super().resolve_command(ctx, args)
        return name, load(name) if name in PROGRAMS else stub, rest


def load(name: str) -> Any:
    """Import a program and return its command."""
    module, target = PROGRAMS[name].module, PROGRAMS[name].name
    if module.startswith("tools."):
        # An installation keeps tools/ inside the launcher.
        sys.path.insert(0, str(import_module("wemmu.config.shipped").HOME))
    found = getattr(import_module(module), target)
    return typer.main.get_command(found if isinstance(found, typer.Typer) else program(found))


def _version(chosen: bool) -> None:
    if not chosen:
        return
    from wemmu.revision import revision

    project = Path(__file__).parents[1] / "pyproject.toml"
    number = (
        tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]
        if project.is_file()
        else version("wemmu")
    )
    found = revision()
    commit = f"commit {found.commit}{', changed' * found.dirty}" if found else "installed, commit unknown"
    print(f"wemmu {number} ({commit})")
    raise typer.Exit


app = typer.Typer(cls=FrontDoor, no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _about(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show version and commit.")
    ] = False,
) -> None:
    """Train, evaluate and use WeMMU. Start with `wemmu run shapes/demo.yaml`.

    `wemmu COMMAND --help` explains a command; docs/cli.md lists exit codes.
    """


def main() -> None:
    start(app, "wemmu")


if __name__ == "__main__":
    main()
