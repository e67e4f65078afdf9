"""The page of one stage: RUN/STAGE/index.html, one file that needs nothing else, from what the stage's folder holds."""

from datetime import datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from wemmu.config.files import replace_text
from wemmu.evaluation.report_charts import loss_charts
from wemmu.evaluation.report_html import templates
from wemmu.evaluation.report_record import StageRecord, read_stage
from wemmu.evaluation.report_samples import NAMES, data_uri
from wemmu.evaluation.stage_charts import attempt_starts, machine_charts, share_chart
from wemmu.jsonlines import read_lines, stage_events

PAGE_FILE = "index.html"
# Sample sheets on the page; of more, the first, the last and as many between.
SHEETS = 12
# What a line of the record says of the machine, in words, with its unit.
SHOWN = {
    "loss": ("loss", "{:.4f}"),
    "grad_norm": ("gradient norm before clipping", "{:.3g}"),
    "lr": ("learning rate", "{:.3g}"),
    "samples_per_s": ("samples per second", "{:.3g}"),
    "tokens_per_s": ("tokens per second", "{:,.0f}"),
    "flops_per_s": ("model FLOP per second", "{:.3g}"),
    "mfu": ("MFU", "{:.1%}"),
    "data_wait_share": ("time spent waiting for data", "{:.1%}"),
    "memory/gpu_allocated_gb": ("peak GPU memory allocated, GB", "{:.1f}"),
    "memory/gpu_reserved_gb": ("peak GPU memory reserved, GB", "{:.1f}"),
    "memory/host_gb": ("peak host memory of a rank, GB", "{:.2f}"),
}


def write_page(folder: Path) -> Path:
    """Write the page of the stage in `folder`; returns its path. What the folder does not hold is left out.

    Raises:
        ReportError: if it is no folder of a stage.
    """
    record = read_stage(folder)
    text = templates().get_template("stage.html.j2").render(_context(record))
    replace_text(folder / PAGE_FILE, text)
    return folder / PAGE_FILE


def _context(record: StageRecord) -> dict[str, Any]:
    events = stage_events(record.folder)
    charts = [
        *loss_charts(record, NAMES),
        *share_chart(record, NAMES),
        *machine_charts(record, attempt_starts(events, record.name)),
    ]
    logged = [line for line in record.metrics if "loss" in line]
    newest = logged[-1] if logged else {}
    return {
        "name": f"{record.run.name}: {record.name}",
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "stage": record,
        "report": "../report.html" if (record.folder.parent / "report.html").is_file() else None,
        "step": max(record.step, int(newest.get("step", 0))),
        "newest": [(words, form.format(newest[key])) for key, (words, form) in SHOWN.items() if key in newest],
        "charts": [Markup(chart) for chart in charts],
        "sheets": _sheets(record),
        "events": [_shown(event) for event in events],
        "environments": read_lines(record.folder / "environment.jsonl"),
        "config": (record.folder / "config.yaml").read_text(encoding="utf-8"),
    }


def _shown(event: dict[str, Any]) -> dict[str, str]:
    steps = [f"{event[key]}" for key in ("from_step", "to_step") if event.get(key) is not None]
    where = event.get("nodes") or event.get("host") or ""
    return {
        "time": str(event.get("time", ""))[:19].replace("T", " "),
        "job": str(event["job"]),
        "attempt": str(event.get("attempt") or ""),
        "event": str(event.get("event", "")),
        "steps": " \u2192 ".join(steps),
        "reason": str(event.get("reason", "")),
        "where": f"{where}, job {event['slurm']}" if event.get("slurm") else where,
    }


def _sheets(record: StageRecord) -> list[tuple[int, str]]:
    """(step, the sheet as the address of itself), oldest first."""
    files = sorted((record.folder / "samples").glob("step_" + "[0-9]" * 8 + ".png"))
    if len(files) > SHEETS:
        files = [files[round(i * (len(files) - 1) / (SHEETS - 1))] for i in range(SHEETS)]
    return [(int(file.stem.removeprefix("step_")), data_uri(file)) for file in files]
