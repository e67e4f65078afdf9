"""Upload the missing steps of a run to Weights & Biases: `python tools/wandb_sync.py RUN`.

RUN is a run folder, or the folder of one of its stages. What is uploaded is the record (metrics.jsonl, samples,
config, ledger), each stage into the run whose id its folder keeps. W&B is asked for the last step it has, so this can
be run again and again, and after attempts that were online: nothing is sent twice.
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer
import wandb

from wemmu.command_line import FAILED, UsageError, fail, plainly, program, start
from wemmu.config import load_stages
from wemmu.jsonlines import read_lines
from wemmu.locks import LockedError
from wemmu.training.upload import run_id, upload


@plainly()
def main(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or the folder of a stage.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be uploaded.")] = False,
) -> None:
    """Upload every stage of a run that has a record."""
    stages = [run] if (run / "config.yaml").is_file() else [folder for folder, _ in load_stages(run)]
    stages = [folder for folder in stages if (folder / "metrics.jsonl").exists()]
    if not stages:
        raise UsageError(
            f"{run} holds no stage with a metrics.jsonl; valid choices: a folder that `wemmu run` made, or that of one "
            "of its stages, after training has begun"
        )
    for folder in stages:
        lines = len(read_lines(folder / "metrics.jsonl"))
        if dry_run:
            print(f"{folder}: {lines} lines for the W&B run {run_id(folder)}")
            continue
        try:
            print(f"{folder}: {upload(folder)} of {lines} lines uploaded, the others were there")
        except (LockedError, wandb.Error) as error:
            fail(f"{folder} was not uploaded: {error}", FAILED, error)


if __name__ == "__main__":
    start(program(main))
