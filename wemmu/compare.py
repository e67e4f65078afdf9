"""Compare two result cards, request by request: `wemmu compare A B`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from wemmu.command_line import AsJson, plainly, program, start
from wemmu.config.benchmarks import check_card


@plainly()
def main(
    a: Annotated[Path, typer.Argument(metavar="A", help="Folder of a benchmark's results, or its card.json.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another folder or card of the same benchmark.")],
    json_: AsJson = False,
) -> None:
    """Print the scores of two result cards and their paired difference with a 95 % interval.

    Benchmark, prompt files, judges, requests, resolution and seed must be equal.
    """
    for given in (a, b):
        check_card(given)
    # With it comes torch.
    from wemmu.config.base import differences
    from wemmu.evaluation.benchmark import benchmark_class
    from wemmu.evaluation.card import compare, read_card

    first, second = read_card(a)[0], read_card(b)[0]
    found = compare(a, b, benchmark_class(first["benchmark"]).headline)
    if json_:
        print(json.dumps(found, indent=1))
        return
    print(f"{first['title']}: {first['n']} images of {first['units']} requests each")
    for name, old, new in differences(first["settings"], second["settings"]):
        print(f"  {name}: {old} -> {new}")
    print(f"{'score':32} {'A':>9} {'B':>9} {'B - A':>9}  95 % interval")
    for name, one in found.items():
        clear = "" if one["low"] <= 0 <= one["high"] else "  *"
        print(
            f"{name:32} {one['a']:9.4f} {one['b']:9.4f} {one['difference']:+9.4f}  "
            f"[{one['low']:+.4f}, {one['high']:+.4f}]{clear}"
        )
    print("* zero is outside of the interval")


if __name__ == "__main__":
    start(program(main))
