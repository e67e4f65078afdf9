"""Compute what a curriculum will cost: `wemmu plan CURRICULUM --world 64`."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from wemmu.command_line import AsJson, CurriculumFile, Overrides, plainly, program, start
from wemmu.config import load_curriculum
from wemmu.planning.layout import Degrees
from wemmu.planning.plan import GPUS, Assumptions, Machine, plan
from wemmu.planning.tables import render


@plainly()
def main(
    curriculum: CurriculumFile,
    world: Annotated[int | None, typer.Option(min=1, help="Number of GPUs; default: the curriculum's.")] = None,
    tp: Annotated[
        int | None, typer.Option(min=1, help="Tensor parallel degree of the DiT; default: the curriculum's.")
    ] = None,
    pp: Annotated[
        int | None, typer.Option(min=1, help="Pipeline parallel degree of the DiT; default: the curriculum's.")
    ] = None,
    gpu: Annotated[str, typer.Option(help=f"One of {', '.join(GPUS)}.")] = "h100",
    mfu: Annotated[
        float, typer.Option(help="Assumed MFU: model FLOP/s as a share of the GPUs' bf16 peak.")
    ] = Machine.mfu,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a prompt with text, chat format included.")
    ] = 128,
    empty_prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt without text.")] = 20,
    multi_edit_images: Annotated[int, typer.Option(min=1, help="Input images of a multi-image edit.")] = 2,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, for the task understanding.")] = 64,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Compute parameters, memory, FLOPs and hours of every stage, with the real classes but without weights.

    At full size the first call takes one to two minutes, later calls under a second (cache: $WEMMU_CACHE).
    """
    config = load_curriculum(curriculum, overrides or ())
    said = config.parallel
    degrees = Degrees(
        *(own if given is None else given for given, own in ((world, said.ranks), (tp, said.tp), (pp, said.pp)))
    )
    assumptions = Assumptions(prompt_tokens, empty_prompt_tokens, multi_edit_images, answer_tokens)
    result = plan(config, Machine(gpu, degrees, mfu), assumptions)
    if as_json:
        print(json.dumps(asdict(result), indent=1))
    else:
        Console().print(render(result))


if __name__ == "__main__":
    start(program(main))
