"""Write the report of a run, `python -m wemmu.report RUN`, or the page of a stage, `python -m wemmu.report RUN/STAGE`.

RUN/report.html and RUN/samples.png tell of the whole run, RUN/STAGE/index.html of one stage; the first makes the pages
of all stages anew.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from wemmu.config.files import said_plainly


# EX_CONFIG: a job that reports would fail the same way again.
@said_plainly(78)
def main(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder, as the launcher makes it, or that of a stage.")
    ],
) -> None:
    """Tell what a run did, from what its folder holds; one that is not finished gets a report of what there is."""
    from wemmu.evaluation.run_record import ReportError
    from wemmu.evaluation.run_report import write_report
    from wemmu.evaluation.stage_page import write_page

    try:
        if (folder / "config.yaml").is_file():
            print(write_page(folder))
            return
        report, sheet = write_report(folder)
    except ReportError as error:
        sys.exit(str(error))
    print(f"{report}\n{sheet}")


if __name__ == "__main__":
    typer.run(main)
