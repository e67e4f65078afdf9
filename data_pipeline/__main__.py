"""`wemmu data`, also `python -m data_pipeline`: buckets CURRICULUM, write CURRICULUM, inspect DIR, verify DIR."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from wemmu.command_line import FAILED, AsJson, CurriculumFile, Overrides, UsageError, plainly, program, start
from wemmu.config import load_curriculum


def tables(as_json: bool) -> Console:
    """Return a console; 120 columns wide without a terminal. JSON has stdout for itself and needs no tables."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120, quiet=as_json)


def lines(as_json: bool = False) -> Console:
    """Print a message as one line, without markup; on stderr if stdout is JSON."""
    return Console(soft_wrap=True, markup=False, highlight=False, stderr=as_json)


@plainly()
def buckets(
    curriculum: CurriculumFile,
    overrides: Overrides = None,
    sample: Annotated[int, typer.Option(min=1, help="Number of records to read from each source.")] = 1000,
    as_json: AsJson = False,
) -> None:
    """Show the buckets and the share of records in each.

    Writes nothing.
    """
    from data_pipeline.preview_text import show_buckets

    found = show_buckets(load_curriculum(curriculum, overrides or ()), tables(as_json), sample)
    if as_json:
        print(json.dumps(found, indent=1))


@plainly()
def write(
    curriculum: CurriculumFile,
    overrides: Overrides = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Number of writing processes; default: one per core; 0: this process.")
    ] = None,
    ray: Annotated[str | None, typer.Option(help="Use the Ray cluster at this address (HOST:PORT or auto).")] = None,
) -> None:
    """Write the shards of a curriculum.

    The folder is data.shards. The same command continues after an interruption.
    """
    if workers is not None and ray is not None:
        raise UsageError("--workers is for processes of this machine, and --ray uses a cluster's; leave out one")
    from data_pipeline.write import write

    write(load_curriculum(curriculum, overrides or ()), lines(), workers, ray)


@plainly()
def inspect(
    directory: Annotated[Path, typer.Argument(help="Folder of a data set, or of any MDS shards.")],
    images: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="PNG file to write, with the first records of each stream."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the streams of a data set and a record of each."""
    from data_pipeline.inspect import inspect

    found = inspect(directory, tables(as_json), images)
    if as_json:
        print(json.dumps(found, indent=1))


@plainly()
def verify(
    directory: Annotated[Path, typer.Argument(help="Folder of a data set, finished or not.")],
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of reading processes; default: by cores and size of the data.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read a data set and check its hashes.

    Exits with 1 if it is incomplete or damaged.
    """
    from data_pipeline.verify import verify

    found = verify(directory, lines(as_json), workers)
    if as_json:
        print(json.dumps({"whole": found.whole, **asdict(found)}, indent=1))
    if not found.whole:
        raise typer.Exit(FAILED)


app = program(buckets, write, inspect, verify, help="Write and inspect the shards that training reads.")


def main() -> None:
    start(app)


if __name__ == "__main__":
    main()
