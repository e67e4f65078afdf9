"""Upload what Weights & Biases does not have of a run yet: `python tools/wandb_sync.py RUN`.

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

from wemmu.command_line import plainly
from wemmu.config import ConfigError, load_stage
from wemmu.jsonlines import read_lines
from wemmu.locks import LockedError
from wemmu.training.upload import Upload, alone, run_id

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or that of one stage.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what there is to upload.")] = False,
) -> None:
    """Upload every stage of a run that has a record."""
    try:
        for folder in stages(run):
            lines = len(read_lines(folder / "metrics.jsonl"))
            if dry_run:
                print(f"{folder}: {lines} lines for the W&B run {run_id(folder)}")
                continue
            with alone(folder, wait=False):
                upload = Upload(folder)
                sent = upload.send()
                upload.finish()
            print(f"{folder}: {sent} of {lines} lines uploaded, the others were there")
    except (LockedError, ValueError, wandb.Error) as error:
        sys.exit(str(error))


def stages(run: Path) -> list[Path]:
    """The folders of the stages that have a record, in their order.

    Raises:
        ValueError: if there is none.
    """
    found = []
    for file in (run / "config.yaml", *run.glob("*/config.yaml")):
        try:
            found.append((load_stage(file).stage_index, file.parent))
        except ConfigError:
            continue  # not there, or the config of something else
    with_record = [folder for _, folder in sorted(found) if (folder / "metrics.jsonl").exists()]
    if not with_record:
        raise ValueError(
            f"{run} holds no stage with a metrics.jsonl; valid choices: a folder that `wemmu run` made, "
            "or that of one of its stages, after training has begun"
        )
    return with_record


if __name__ == "__main__":
    with plainly():
        app()
