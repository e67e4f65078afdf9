"""Write the report of a run, `wemmu report RUN`, or the page of a stage, `wemmu report RUN/STAGE`.

RUN/report.html and RUN/samples.png tell of the whole run, RUN/STAGE/index.html of one stage; the first makes the pages
of all stages anew.
"""

from pathlib import Path
from typing import Annotated

import typer

from wemmu.command_line import plainly, program, start


@plainly()
def main(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder, as the launcher makes it, or that of a stage.")
    ],
) -> None:
    """Tell what a run did, from what its folder holds; one that is not finished gets a report of what there is."""
    from wemmu.evaluation.run_report import write_report
    from wemmu.evaluation.stage_page import write_page

    if (folder / "config.yaml").is_file():
        print(write_page(folder))
    else:
        print(*write_report(folder), sep="\n")


if __name__ == "__main__":
    start(program(main))
