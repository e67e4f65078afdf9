"""`python -m data_pipeline`: buckets CURRICULUM.yaml, write CURRICULUM.yaml, inspect DIR, verify DIR."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from wemmu.config import ConfigError, load_curriculum
from wemmu.config.files import LASTING
from wemmu.config.shards import ShardError

# Tells the launcher that another attempt would fail alike.
EX_CONFIG = 78

app = typer.Typer(help="Write and look at the shards that training reads.", no_args_is_help=True, add_completion=False)


CurriculumFile = Annotated[Path, typer.Argument(help="The curriculum whose stages will read the shards.")]
Overrides = Annotated[list[str], typer.Option("--set", metavar="FIELD=VALUE", help="Override a field.")]


@contextmanager
def plainly() -> Iterator[None]:
    """End the process with a sentence, and an exit code of the kind, for errors that a person can mend."""
    try:
        yield
    except (ConfigError, ShardError) as error:
        from data_pipeline.write import BusyError

        Console(stderr=True, soft_wrap=True).print(str(error), style="red", markup=False, highlight=False)
        raise SystemExit(1 if isinstance(error, BusyError) else EX_CONFIG) from None
    except OSError as error:
        # A full disk, a folder that may not be written, a source that cannot be read any more.
        words = f"{error}. What is finished stays; when it is mended, run the same command again"
        Console(stderr=True, soft_wrap=True).print(words, style="red", markup=False, highlight=False)
        raise SystemExit(EX_CONFIG if error.errno in LASTING else 1) from None


def tables() -> Console:
    """Of 120 columns where there is no terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def lines() -> Console:
    """One line of output for each message, however long, and nothing in it taken as markup."""
    return Console(soft_wrap=True, markup=False, highlight=False)


@app.command()
@plainly()
def buckets(
    curriculum: CurriculumFile,
    set_: Overrides = [],  # noqa: B006
    sample: Annotated[int, typer.Option(min=1, help="Records to look at of each source.")] = 1000,
) -> None:
    """Show the buckets of CURRICULUM and what would go to each, before anything is written."""
    from data_pipeline.preview_text import show_buckets

    show_buckets(load_curriculum(curriculum, set_), tables(), sample)


@app.command()
@plainly()
def write(
    curriculum: CurriculumFile,
    set_: Overrides = [],  # noqa: B006
    workers: Annotated[
        int | None, typer.Option(min=0, help="Writing processes; by default one a core, 0: this one.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help="Address of a running Ray cluster (HOST:PORT or auto) to use instead of an own.")
    ] = None,
) -> None:
    """Write what is missing of the data set of CURRICULUM into its data.shards."""
    from data_pipeline.write import write

    write(load_curriculum(curriculum, set_), lines(), workers, ray)


@app.command()
@plainly()
def inspect(
    directory: Annotated[Path, typer.Argument(help="A data set that `write` made, or any MDS shards.")],
    images: Annotated[
        Path | None,
        typer.Option(
            "--images", "--pictures", metavar="FILE.png", help="Draw the first records of every stream into this file."
        ),
    ] = None,
) -> None:
    """Print the streams of a data set and one example record of each."""
    from data_pipeline.inspect import inspect

    inspect(directory, tables(), images)


@app.command()
@plainly()
def verify(
    directory: Annotated[Path, typer.Argument(help="A data set that `write` made, or began.")],
    workers: Annotated[int | None, typer.Option(min=1, help="Reading processes.")] = None,
) -> None:
    """Read and hash all of a data set again; the exit code is 1 unless it is complete and whole."""
    from data_pipeline.verify import verify

    if not verify(directory, lines(), workers):
        raise typer.Exit(1)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
