"""Train one stage: `wemmu train RUN/stage1/config.yaml`. The config's folder is the run folder."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from wemmu.command_line import FAILED, FINAL, fail, plainly, program, start
from wemmu.config import load_stage
from wemmu.config.files import LASTING
from wemmu.heartbeat import VARIABLE, answer_with_stacks
from wemmu.training.signals import StopFlag


@plainly()
def main(
    config: Annotated[
        Path, typer.Argument(metavar="RUN/STAGE/config.yaml", help="Config of the stage; the launcher writes it.")
    ],
) -> None:
    """Train one stage in this process. The same command resumes it from its last checkpoint."""
    # First: a signal during the import of libraries or the build of the model must not kill the rank.
    stop = StopFlag()
    answer_with_stacks()
    run = load_stage(config)
    # A bad config is refused above, before torch and the models are imported.
    from wemmu.checkpoint.finite import NotFiniteError
    from wemmu.parallel.rendezvous import RendezvousError
    from wemmu.training.trainer import Trainer

    try:
        trainer = Trainer(run, config.resolve().parent, stop)
        code = trainer.train()
    except NotFiniteError as error:
        fail(f"{run.stage.name}: {error}. {_newest_finite(config.parent / 'checkpoints')}", FINAL)
    except RendezvousError as error:
        # The launcher takes another port the next time; by hand the same command finds the same.
        fail(f"{run.stage.name}: {error}", FAILED if VARIABLE in os.environ else FINAL)
    except OSError as error:
        if error.errno not in LASTING:
            raise
        fail(f"{run.stage.name}: the run folder {config.parent} cannot be written: {error}", FINAL)
    if code == 0 and trainer.topology.leads:
        _write_page(trainer.folder)
    raise typer.Exit(code)


def _write_page(folder: Path) -> None:
    """Write the stage's page. The stage has ended and is saved, so an error here is only printed."""
    try:
        from wemmu.evaluation.stage_page import write_page

        print(f"{write_page(folder)} shows what happened", flush=True)
    except Exception as error:
        print(f"the page of {folder} could not be written: {type(error).__name__}: {error}", file=sys.stderr)


def _newest_finite(checkpoints: Path) -> str:
    from wemmu.checkpoint.stored import newest_finite

    if os.environ.get("RANK", "0") not in ("", "0"):
        return "The first rank says where to go on from"
    if (last := newest_finite(checkpoints)) is None:
        return "No checkpoint is finite: start again, with a lower learning rate"
    return (
        f"The newest finite checkpoint is {last}: move newer ones away and resume from it, with a lower learning rate"
    )


if __name__ == "__main__":
    start(program(main))
