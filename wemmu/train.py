"""Train one stage: `python -m wemmu.train RUN/stage1/config.yaml`. The config's folder is the run folder."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from wemmu.config import ConfigError, load_stage

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(config: Annotated[Path, typer.Argument(help="config.yaml of one stage, as the launcher writes it")]) -> None:
    """Train a stage to its end; run again after any interruption, it goes on from its last checkpoint."""
    try:
        run = load_stage(config)
    except ConfigError as error:
        sys.exit(str(error))
    # A bad config is refused above before torch and the models are imported.
    from wemmu.config.shards import ShardError
    from wemmu.training.checkpoint import CheckpointError
    from wemmu.training.trainer import Trainer, TrainingError

    try:
        code = Trainer(run, config.resolve().parent).train()
    except (TrainingError, CheckpointError, ShardError, FileNotFoundError) as error:
        sys.exit(f"{run.stage.name}: {error}")
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
