"""`python -m data_pipeline write CURRICULUM.yaml` and `python -m data_pipeline inspect DIR`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from data_pipeline.write import write as write_dataset
from wemmu.config import ConfigError, load_curriculum
from wemmu.config.shards import ShardError

app = typer.Typer(help="Write and look at the shards that training reads.", no_args_is_help=True, add_completion=False)


@app.command()
def write(
    curriculum: Annotated[Path, typer.Argument(help="The curriculum whose stages will read the shards.")],
    set_: Annotated[list[str], typer.Option("--set", metavar="FIELD=VALUE", help="Override a field.")] = [],  # noqa: B006
    workers: Annotated[
        int | None, typer.Option(min=1, help="Writing processes; by default one for 8 partitions, at most one a core.")
    ] = None,
) -> None:
    """Write what is missing of the data set of CURRICULUM into its data.shards."""
    write_dataset(load_curriculum(curriculum, set_), Console(soft_wrap=True, markup=False, highlight=False), workers)


@app.command()
def inspect(directory: Annotated[Path, typer.Argument(help="A directory that `write` made.")]) -> None:
    """Print the streams of a data set and one example record of each."""
    from data_pipeline.inspect import inspect_dataset

    inspect_dataset(directory, Console())


def main() -> None:
    try:
        app()
    except (ConfigError, ShardError) as error:
        Console(stderr=True, soft_wrap=True).print(str(error), style="red", markup=False, highlight=False)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
