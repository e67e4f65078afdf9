"""The report of a run: RUN/report.html, one file that needs nothing else, and RUN/samples.png."""

import math
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from wemmu.config.files import replace_text
from wemmu.evaluation.page import write_page
from wemmu.evaluation.report_charts import SPLITS, loss_charts, score_charts
from wemmu.evaluation.report_html import templates
from wemmu.evaluation.report_record import RunRecord, StageRecord, read_run
from wemmu.evaluation.report_samples import NAMES, comparison, groups, newest_sheets, newest_with_samples, sheet
from wemmu.evaluation.scores import HEADLINE
from wemmu.revision import revision

REPORT_FILE, SHEET_FILE = "report.html", "samples.png"
MODULES = {
    "vlm": "VLM",
    "vae": "Autoencoder",
    "bridge.pathway": "Generation pathway",
    "bridge.vae_branch": "VAE branch",
    "bridge.queries": "Queries",
    "bridge.position_mlp": "Position MLP",
    "dit": "DiT",
    "vlm.model.visual.merger": "Projector",
    "vlm.model.language_model": "Language model",
    "head": "Reconstruction head",
}
ANSWERED = {
    "satisfied": "the picture shows what the caption says, and nothing else",
    "same": "the scene came out again",
    "readable": "the picture is a scene of the world",
    "correct": "the instruction was followed and the rest left alone",
    "followed": "the named part is as asked",
    "preserved": "everything else is as it was",
    "right": "the answer is right, word by word",
    "restored": "the scene can be read from what the head restored",
    "copied": "the input came out unchanged: the instruction was ignored",
}


def write_report(folder: Path) -> tuple[Path, Path]:
    """Write the report and the sample sheet of a run folder, and the pages of its stages; returns the first two paths.

    Parts that are missing are named.

    Raises:
        ReportError: if the folder holds no stage.
    """
    record = read_run(folder)
    picture = folder / f"{SHEET_FILE}.tmp"
    sheet(record).save(picture, "PNG")
    picture.replace(folder / SHEET_FILE)
    replace_text(folder / REPORT_FILE, templates().get_template("report.html.j2").render(_context(record)))
    # After the report, so that they link to it.
    for stage in record.stages:
        write_page(stage.folder)
    return folder / REPORT_FILE, folder / SHEET_FILE


def _context(record: RunRecord) -> dict[str, Any]:
    newest = newest_with_samples(record)
    return {
        "name": record.name,
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "opening": opening(record),
        "stages": record.stages,
        "missing": missing(record),
        "newest": newest,
        "groups": groups(newest) if newest else [],
        "sheets": newest_sheets(record),
        "splits": SPLITS,
        "comparison": comparison(record.stages),
        "scores": _score_table(record.stages),
        "score_charts": [Markup(chart) for chart in score_charts(record.stages, NAMES)],
        "details": _details(record.stages),
        "answered": ANSWERED,
        "losses": [(s, [Markup(c) for c in charts]) for s in record.stages if (charts := loss_charts(s, NAMES))],
        "modules": _modules(record.stages),
        "frozen": _frozen_sentence(record.stages),
        "parts": record.parts,
        "longest": max((part.seconds for part in record.parts), default=0.0),
        "data": record.data,
        "data_page": _data_page(record),
        "curriculum": _text(record.folder / "curriculum.yaml"),
        "environment": _environment(record),
    }


def opening(record: RunRecord) -> str:
    """One sentence: what was trained, and where it began."""
    stages = record.stages
    count = f"{len(stages)} stage{'s' if len(stages) > 1 else ''}"
    steps = _listed([str(stage.run.stage.steps) for stage in stages])
    given = [stage for stage in stages if stage.given_start]
    if not given:
        return f"The bridge was trained from zero, through {count} of {steps} steps."
    if len(given) == len(stages):
        longer = [stage.start_manifest["step"] for stage in given if stage.start_manifest]
        of = f" of {_listed([str(step) for step in longer])} steps" if len(longer) == len(given) else ""
        return (
            f"This run continued shipped weights of a longer run{of} for {steps} steps in its "
            f"{count}. Most of what the pictures show was learnt in that longer run."
        )
    return (
        f"Of {count} ({steps} steps), {_listed([s.name for s in given])} started from weights named in the curriculum "
        "and not from the stage before."
    )


def missing(record: RunRecord) -> list[str]:
    """What a whole run would have and this folder has not, in sentences."""
    notes = []
    for stage in record.stages:
        steps = stage.run.stage.steps
        if stage.manifest is None:
            notes.append(f"{stage.name} has not been trained: it has no checkpoint.")
        elif not stage.finished:
            notes.append(f"{stage.name} is not finished: its newest checkpoint is of step {stage.step} of {steps}.")
        if stage.manifest and not stage.metrics:
            notes.append(f"{stage.name} has no metrics.jsonl, so its losses are not known.")
        if stage.manifest and stage.results is None and stage.run.evaluation.prompts:
            notes.append(f"{stage.name} has not been evaluated.")
        elif stage.results and stage.results.get("checkpoint", {}).get("step", stage.step) != stage.step:
            at = stage.results["checkpoint"]["step"]
            notes.append(f"The scores of {stage.name} are of step {at}, its newest checkpoint is of step {stage.step}.")
    if not record.parts:
        notes.append("The launcher's ledger is missing or empty, so times are not known.")
    if record.data is None:
        notes.append(f"The data set {record.stages[0].run.data.shards} is not there, so it is not described.")
    if record.curriculum is None:
        notes.append("curriculum.yaml is missing or cannot be read.")
    return notes


def _data_page(record: RunRecord) -> str | None:
    """Link from the report to the page of the data set, if both are on this machine."""
    page = record.stages[0].run.data.shards / REPORT_FILE
    return os.path.relpath(page.resolve(), record.folder.resolve()) if page.is_file() else None


def _score_table(stages: Sequence[StageRecord]) -> list[dict[str, Any]]:
    """Rows of the score table: one for each task and split; a cell is a share, or None where it was not scored."""
    rows = []
    for task, measure in HEADLINE.items():
        for split in SPLITS:
            parts = [(stage.results or {"tasks": {}})["tasks"].get(task, {}).get(split) for stage in stages]
            if any(parts):
                cells = [part and part["measures"][measure] for part in parts]
                rows.append({"task": NAMES[task], "split": SPLITS[split], "measure": ANSWERED[measure], "cells": cells})
    return rows


def _details(stages: Sequence[StageRecord]) -> dict[str, Any] | None:
    """All measures of the newest evaluated stage, whole and by group."""
    stage = next((s for s in reversed(stages) if s.results), None)
    if stage is None or stage.results is None:
        return None
    tables = [
        {
            "title": f"{NAMES[task]}: {SPLITS[split]}",
            "measures": list(part["measures"]),
            "rows": [("all", part["measures"]), *part["by"].items()],
        }
        for task, by_split in stage.results["tasks"].items()
        for split, part in by_split.items()
    ]
    return {"stage": stage.name, "tables": tables, "settings": stage.results}


def _modules(stages: Sequence[StageRecord]) -> list[dict[str, Any]]:
    """Rows of the table of modules: for each stage its number of parameters and whether they were trained."""
    rows = [{"name": name, "cells": [_module(stage, prefix) for stage in stages]} for prefix, name in MODULES.items()]
    return [row for row in rows if any(row["cells"])]


def _module(stage: StageRecord, prefix: str) -> dict[str, Any] | None:
    if stage.manifest is None:
        return None
    if prefix in stage.manifest["frozen"]:
        return {"state": "frozen", "note": stage.manifest["frozen"][prefix][:10]}
    tensors = {n: shape for n, shape in stage.manifest["tensors"].items() if n.startswith(f"{prefix}.")}
    if not tensors:
        return None
    trained = any(name in tensors for name in stage.manifest["trained"])
    parameters = sum(math.prod(shape) for shape in tensors.values())
    return {"state": "trained" if trained else "kept", "note": amount(parameters)}


def _frozen_sentence(stages: Sequence[StageRecord]) -> str:
    manifests = [stage.manifest for stage in stages if stage.manifest]
    if not manifests:
        return "No checkpoint tells yet."
    always = [part for part in manifests[0]["frozen"] if all(part in m["frozen"] for m in manifests)]
    changed = [part for part in always if len({m["frozen"][part] for m in manifests}) > 1]
    names = _listed([MODULES.get(part, part) for part in always])
    if changed:
        return f"Not the same in all stages, although frozen: {_listed([MODULES.get(p, p) for p in changed])}."
    return f"Frozen in every stage, and by SHA-256 the same weights in each: {names or 'nothing'}."


def _environment(record: RunRecord) -> dict[str, str]:
    manifest = next((stage.manifest for stage in reversed(record.stages) if stage.manifest), None)
    return {"git commit, when this was written": _git(), **(manifest["libraries"] if manifest else {})}


def _git() -> str:
    """Commit of the code that writes this report, and whether it was changed since."""
    found = revision()
    if found is None:
        return "unknown: not a git checkout"
    return found.commit + (" with uncommitted changes" if found.dirty else "")


def _text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else ""


def amount(parameters: int) -> str:
    """Parameters as `1.23 M`, or `45.6 k` below a tenth of a million."""
    return f"{parameters / 1e6:.2f} M" if parameters >= 1e5 else f"{parameters / 1e3:.1f} k"
