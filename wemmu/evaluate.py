"""Score a stage's newest checkpoint: `python -m wemmu.evaluate RUN/stage3`. Writes RUN/stage3/evaluation.json."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from wemmu.config import ConfigError, load_stage
from wemmu.config.checkpoints import CHECKPOINTS
from wemmu.config.files import said_plainly
from wemmu.training.signals import EXIT_FINAL


@said_plainly(EXIT_FINAL)
def main(
    folder: Annotated[Path, typer.Argument(metavar="RUN/STAGE", help="Folder of a stage that has a checkpoint.")],
    prompts: Annotated[int | None, typer.Option(min=1, help="Requests of each task; else evaluation.prompts.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Checkpoint directory; else the newest.")] = None,
    ema: Annotated[bool | None, typer.Option(help="Score the moving average; else if the stage keeps one.")] = None,
) -> None:
    """Draw held-out requests with a trained stage and score them exactly."""
    try:
        run = load_stage(folder / "config.yaml")
    except ConfigError as error:
        _fail_for_good(error)
    number = prompts or run.evaluation.prompts
    if number == 0:
        sys.exit(f"{run.stage.name}: evaluation.prompts is 0, so there is nothing to draw; give --prompts N with N > 0")
    # A bad request is refused above before torch and the models are imported.
    import torch

    from wemmu.evaluation.responses import answering, drawing
    from wemmu.evaluation.runner import evaluate, write_results
    from wemmu.sampling.answers import Answerer
    from wemmu.sampling.sampler import Sampler
    from wemmu.training.build import load_trained
    from wemmu.training.collective import CheckpointError
    from wemmu.training.finite import NotFiniteError
    from wemmu.training.manifest import read_manifest
    from wemmu.training.retention import latest

    if run.threads is not None:
        torch.set_num_threads(run.threads)
    try:
        chosen = checkpoint or latest(folder / CHECKPOINTS)
        if chosen is None:
            sys.exit(f"{folder} has no checkpoint; train it first: python -m wemmu.train {folder / 'config.yaml'}")
        manifest = read_manifest(chosen)
        model, encoder = load_trained(run, chosen, ema)
    except (ConfigError, NotFiniteError) as error:
        _fail_for_good(error)
    except (CheckpointError, FileNotFoundError) as error:
        sys.exit(f"{run.stage.name}: {error}")
    if run.stage.reconstructs:
        respond = answering(Answerer(model, encoder), run)
    else:
        respond = drawing(Sampler(model, encoder, run.stage.objective.time.shift_at(run.stage.resolution)), run)
    averaged = run.stage.averages(ema)
    what = f"the average (EMA) in {chosen.name}" if averaged else chosen.name
    print(f"{run.stage.name}: scoring {what} of {manifest.stage}, {number} requests of each task", flush=True)
    results = evaluate(respond, run, number, folder)
    origin = {"directory": chosen.name, "stage": manifest.stage, "step": manifest.step, "ema": averaged}
    print(f"{run.stage.name}: scores in {write_results(results | {'checkpoint': origin}, folder)}", flush=True)


def _fail_for_good(error: Exception) -> NoReturn:
    """No further attempt would help."""
    print(error, file=sys.stderr)
    raise SystemExit(EXIT_FINAL)


if __name__ == "__main__":
    typer.run(main)
