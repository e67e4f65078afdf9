"""Tell what this machine has, what training will use and what is wrong: `python -m wemmu.doctor [CURRICULUM.yaml]`."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from wemmu.diagnosis.report import as_json, diagnose, of_status, render


def main(
    curriculum: Annotated[Path | None, typer.Argument(help="Curriculum in YAML: whether it can run here, too.")] = None,
    json_wanted: Annotated[bool, typer.Option("--json", help="Every finding as JSON.")] = False,
) -> None:
    """Check this machine and a curriculum; exits with 1 if anything is wrong. Nothing is changed, nobody is called."""
    # What libraries print when they are imported is no part of the answer.
    with Console(stderr=True).status("Looking at this machine ..."), contextlib.redirect_stdout(sys.stderr):
        report = diagnose(curriculum)
    if json_wanted:
        print(json.dumps(as_json(report), indent=1))
    else:
        Console().print(render(report))
    sys.exit(1 if of_status(report, "problem") else 0)


if __name__ == "__main__":
    typer.run(main)
