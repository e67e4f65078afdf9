"""The page of a result card: scores, settings, and the first images of every category."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from wemmu.config.base import leaves
from wemmu.config.files import replace_text
from wemmu.evaluation.benchmark import Mark
from wemmu.evaluation.generation import IMAGES, INPUTS, WORDS
from wemmu.evaluation.run_record import StageRecord
from wemmu.jsonlines import read_lines
from wemmu.report import page as kit

PAGE = "index.html"
# Images of each category on the page: always the first ones.
SHOWN = 8


def write_page(folder: Path, card: Mapping[str, Any], marks: Sequence[Mark]) -> Path:
    """Write FOLDER/index.html and return its path."""
    scores = [
        (name, f"{one['value']:.4g}", f"{one['low']:.4g} – {one['high']:.4g}") for name, one in card["scores"].items()
    ]
    columns = ("Score", ">Value", ">95 % interval")
    first = next(iter(scores), ("", "no score", ""))
    lead = f"{first[0]} {first[1]} on {card['n']} images of {card['units']} requests."
    failed = f"{card['failures']} images could not be judged; they are left out of the scores."
    facts = {
        name: value
        for part in ("settings", "files", "judges", "commit")
        for name, value in leaves(card[part] or "unknown", part)
    }
    blocks: list[kit.Block] = [
        kit.Text(lead, "lead"),
        kit.Notes("Not judged", [failed] if card["failures"] else []),
        kit.Section("Scores", [kit.Table("", columns, scores)]),
        kit.Section("Images", _galleries(folder, marks)),
        kit.Section("How they were made", [kit.pairs(facts)]),
    ]
    page = kit.Page(f"{card['title']}: result card", f"Written {kit.now()}", blocks)
    replace_text(folder / PAGE, kit.html(page))
    return folder / PAGE


def cards_section(stages: Sequence[StageRecord], all_scores: bool, root: str | None = None) -> kit.Section | str:
    """Return a table of the stages' result cards, empty without any: their first scores, or all.

    root: what addresses begin with; else each stage's folder.
    """
    rows: list[list[str | kit.Cell]] = []
    for stage in stages:
        for place, card in stage.cards.items():
            address = f"{stage.name + '/' if root is None else root}{place}/{PAGE}"
            about = f"{card['n']} images" + (f", {card['failures']} not judged" if card["failures"] else "")
            title = kit.Cell(kit.link(address, card["title"]), about)
            for score, one in list(card["scores"].items())[: None if all_scores else 1]:
                interval = f"{one['low']:.4g} – {one['high']:.4g}"
                rows.append([stage.name, title, score, f"{one['value']:.4g}", interval])
            if not card["scores"]:
                rows.append([stage.name, title, "no score", "", ""])
    if not rows:
        return ""
    words = "Scores of benchmarks with their 95 % intervals; each name leads to the result card with its images."
    columns = ("Stage", "Benchmark", "Score", ">Value", ">95 % interval")
    return kit.Section("Benchmarks", [words, kit.Table("", columns, rows)])


def _galleries(folder: Path, marks: Sequence[Mark]) -> list[kit.Block]:
    requests = {line["key"]: line for line in read_lines(folder / "requests.jsonl")}
    shown: list[kit.Block] = []
    for category in dict.fromkeys(mark.category for mark in marks):
        own = [mark for mark in marks if mark.category == category][:SHOWN]
        figures = [_figure(folder, mark, requests.get(mark.key, {})) for mark in own]
        shown.append(kit.Gallery("figures", [f for f in figures if f is not None], category))
    return shown


def _figure(folder: Path, mark: Mark, request: Mapping[str, Any]) -> kit.Figure | None:
    made = folder / IMAGES / f"{mark.key}.png"
    if not made.is_file():
        return None
    inputs = [folder / INPUTS / f"{mark.key}_{n}.png" for n in range(request.get("inputs", 0))]
    given = [kit.image(file.read_bytes(), "input", "small") for file in inputs if file.is_file()]
    images = [*given, *(kit.ARROW if given else []), kit.image(made.read_bytes(), "generated")]
    values = ", ".join(f"{n} {'not judged' if v is None else format(v, '.3g')}" for n, v in mark.values.items())
    with Image.open(made) as image:
        words = image.info.get(WORDS)
    asked = request.get("text") or mark.category
    return kit.Figure(images, f"{asked}: {words}" if words else asked, values)
