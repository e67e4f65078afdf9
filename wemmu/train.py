"""Train one stage: `python -m wemmu.train RUN/stage1/config.yaml`. The config's folder is the run folder."""

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from wemmu.config import ConfigError, load_stage
from wemmu.config.files import LASTING
from wemmu.training.heartbeat import VARIABLE, answer_with_stacks
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
    from wemmu.locks import LockedError
    from wemmu.parallel.rendezvous import RanksError, RendezvousError
    from wemmu.training.checkpoint import CheckpointError
    from wemmu.training.finite import NotFiniteError
    from wemmu.training.trainer import Trainer, TrainingError

    try:
        trainer = Trainer(run, config.resolve().parent, stop)
        code = trainer.train()
    except NotFiniteError as error:
        _fail(f"{run.stage.name}: {error}. {_newest_finite(config.parent / 'checkpoints')}")
    # A backbone that cannot be loaded is a matter of the config, too.
    except (
        TrainingError,
        CheckpointError,
        LockedError,
        ShardError,
        ConfigError,
        RanksError,
        FileNotFoundError,
    ) as error:
        _fail(f"{run.stage.name}: {error}")
    except RendezvousError as error:
        # The launcher takes another port the next time; by hand the same command finds the same.
        _fail(f"{run.stage.name}: {error}", 1 if VARIABLE in os.environ else EXIT_FINAL)
    except OSError as error:
        if error.errno not in LASTING:
            raise
        _fail(f"{run.stage.name}: the run folder {config.parent} cannot be written: {error}")
    if code == 0 and trainer.topology.leads:
        _write_page(trainer.folder)
    raise typer.Exit(code)


def _write_page(folder: Path) -> None:
    """The stage has ended and is saved: whatever goes wrong here is told and changes nothing of that."""
    try:
        from wemmu.evaluation.stage_page import write_page

        print(f"{write_page(folder)} shows what happened", flush=True)
    except Exception as error:
        print(f"the page of {folder} could not be written: {type(error).__name__}: {error}", file=sys.stderr)


def _newest_finite(checkpoints: Path) -> str:
    from wemmu.training.stored import newest_finite

    if os.environ.get("RANK", "0") not in ("", "0"):
        return "The first rank says where to go on from"
    if (last := newest_finite(checkpoints)) is None:
        return "No checkpoint is finite: begin anew, with a lower learning rate"
    return f"The newest finite checkpoint is {last}: move newer ones away and go on from it, with a lower learning rate"


def _fail(sentence: str, code: int = EXIT_FINAL) -> NoReturn:
    print(sentence, file=sys.stderr)
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
