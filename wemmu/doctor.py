"""Check this machine and, if given, a curriculum: `wemmu doctor [CURRICULUM]`."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from wemmu.command_line import FAILED, AsJson, plainly, program, start
from wemmu.config import load_curriculum, shipped
from wemmu.diagnosis.report import as_json, diagnose, of_status, render


@plainly()
def main(
    curriculum: Annotated[
        Path | None, typer.Argument(metavar="[CURRICULUM]", help="Curriculum to check, in YAML.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Also list the checks that pass.")] = False,
    json_wanted: AsJson = False,
) -> None:
    """Check this machine and a curriculum, and print the remedy for each problem.

    Exits with 1 if there is a problem. Changes nothing and uses no network.
    """
    if curriculum is not None and not shipped.config_file(curriculum).is_file():
        # Raises an error that says what may be meant.
        load_curriculum(curriculum)
    # Libraries print messages when they are imported; drop them.
    with Console(stderr=True).status("Looking at this machine ..."), contextlib.redirect_stdout(sys.stderr):
        report = diagnose(curriculum)
    if json_wanted:
        print(json.dumps(as_json(report), indent=1))
    else:
        Console().print(render(report, every))
    if of_status(report, "problem"):
        raise typer.Exit(FAILED)


if __name__ == "__main__":
    start(program(main))
