"""Train one stage: `python -m wemmu.train RUN/stage1/config.yaml`. The config's folder is the run folder."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from wemmu.config import ConfigError, load_stage
from wemmu.training.heartbeat import answer_with_stacks
from wemmu.training.signals import EXIT_FINAL, StopFlag

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(config: Annotated[Path, typer.Argument(help="config.yaml of one stage, as the launcher writes it")]) -> None:
    """Train a stage to its end; run again after any interruption, it goes on from its last checkpoint."""
    # First of all: a signal that comes while the libraries load or the model is built must not kill the rank.
    stop = StopFlag()
    answer_with_stacks()
    try:
        run = load_stage(config)
    except ConfigError as error:
        _fail(str(error))
    # A bad config is refused above before torch and the models are imported.
    from wemmu.config.shards import ShardError
    from wemmu.training.checkpoint import CheckpointError
    from wemmu.training.trainer import Trainer, TrainingError

    try:
        trainer = Trainer(run, config.resolve().parent, stop)
        code = trainer.train()
    # A backbone that cannot be loaded is a matter of the config, too.
    except (TrainingError, CheckpointError, ShardError, ConfigError, FileNotFoundError) as error:
        _fail(f"{run.stage.name}: {error}")
    if code == 0 and trainer.topology.leads:
        _write_page(trainer.folder)
    raise typer.Exit(code)


def _write_page(folder: Path) -> None:
    """The stage has ended and is saved: whatever goes wrong here is told and changes nothing of that."""
    try:
        from wemmu.evaluation.page import write_page

        print(f"{write_page(folder)} shows what happened", flush=True)
    except Exception as error:
        print(f"the page of {folder} could not be written: {type(error).__name__}: {error}", file=sys.stderr)


def _fail(sentence: str) -> NoReturn:
    print(sentence, file=sys.stderr)
    raise typer.Exit(EXIT_FINAL)


if __name__ == "__main__":
    app()
