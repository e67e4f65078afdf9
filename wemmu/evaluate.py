"""Score a stage's newest checkpoint: `wemmu evaluate RUN`. Writes RUN/STAGE/evaluation.json."""

from pathlib import Path
from typing import Annotated

import typer

from wemmu.command_line import Ema, UsageError, plainly, program, start
from wemmu.config import load_stage
from wemmu.config.checkpoints import CHECKPOINTS, no_checkpoint, stage_folder


@plainly()
def main(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="RUN (its newest finished stage) or RUN/STAGE.")],
    prompts: Annotated[int | None, typer.Option(min=1, help="Requests of each task; else evaluation.prompts.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(metavar="DIR", help="Checkpoint; else the newest.")] = None,
    ema: Ema = None,
) -> None:
    """Answer held-out requests with a trained stage and score them exactly."""
    folder = stage_folder(source)
    run = load_stage(folder / "config.yaml")
    number = prompts or run.evaluation.prompts
    if number == 0:
        raise UsageError(
            f"{run.stage.name}: evaluation.prompts is 0, so there is nothing to draw; give --prompts N with N > 0"
        )
    # Bad input is refused above, before torch and the models are imported.
    import torch

    from wemmu.checkpoint.manifest import read_manifest
    from wemmu.checkpoint.retention import latest
    from wemmu.evaluation.runner import evaluate, write_results
    from wemmu.training.build import load_trained

    if run.threads is not None:
        torch.set_num_threads(run.threads)
    if (chosen := checkpoint or latest(folder / CHECKPOINTS)) is None:
        raise no_checkpoint(folder)
    manifest = read_manifest(chosen)
    made = load_trained(run, chosen, ema)
    averaged = run.stage.averages(ema)
    what = f"the average (EMA) in {chosen.name}" if averaged else chosen.name
    print(f"{run.stage.name}: scoring {what} of {manifest.stage}, {number} requests of each task", flush=True)
    results = evaluate(made.respond, made.sampling(), run, number, folder)
    origin = {"directory": chosen.name, "stage": manifest.stage, "step": manifest.step, "ema": averaged}
    print(f"{run.stage.name}: scores in {write_results(results | {'checkpoint': origin}, folder)}", flush=True)


if __name__ == "__main__":
    start(program(main))
