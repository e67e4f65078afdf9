"""Write the report of a run: `python -m wemmu.report RUN` makes RUN/report.html and RUN/samples.png."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def main(folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, as the launcher makes it.")]) -> None:
    """Tell what a run did, from what its folder holds; a run that is not finished gets a report of what there is."""
    from wemmu.evaluation.report import write_report
    from wemmu.evaluation.report_record import ReportError

    try:
        report, sheet = write_report(folder)
    except ReportError as error:
        sys.exit(str(error))
    print(f"{report}\n{sheet}")


if __name__ == "__main__":
    typer.run(main)
