"""Write the report of a run, `wemmu report RUN`, or the page of a stage, `wemmu report RUN/STAGE`.

RUN/report.html and RUN/samples.png show the whole run, RUN/STAGE/index.html one stage; the first also rewrites the
pages of all stages.
"""

from pathlib import Path
from typing import Annotated

import typer

from wemmu.command_line import plainly, program, start
from wemmu.config.checkpoints import not_a_run


@plainly()
def main(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or the folder of a stage.")],
) -> None:
    """Write the HTML report of a run, finished or not, or the page of a stage."""
    if not ((folder / "config.yaml").is_file() or any(folder.glob("*/config.yaml"))):
        raise not_a_run(folder)
    from wemmu.evaluation.run_report import write_report
    from wemmu.evaluation.stage_page import write_page

    if (folder / "config.yaml").is_file():
        print(write_page(folder))
    else:
        print(*write_report(folder), sep="\n")


if __name__ == "__main__":
    start(program(main))
