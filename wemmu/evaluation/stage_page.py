"""The page of one stage, RUN/STAGE/index.html, from the files of the stage's folder."""

from pathlib import Path
from typing import Any

from markupsafe import Markup

from wemmu.config.checkpoints import step_of
from wemmu.config.files import replace_text
from wemmu.evaluation.benchmark_page import cards_section
from wemmu.evaluation.run_charts import loss_charts, machine_charts, share_charts
from wemmu.evaluation.run_record import StageRecord, read_stage
from wemmu.jsonlines import read_lines, stage_events
from wemmu.report import page as kit

PAGE_FILE = "index.html"
# Maximal number of sample sheets on the page: the first, the last and evenly spaced ones.
SHEETS = 12


def write_page(folder: Path) -> Path:
    """Write the page of the stage in `folder` and return its path. Missing parts are left out.

    Raises:
        ReportError: if it is not the folder of a stage.
    """
    replace_text(folder / PAGE_FILE, kit.html(_page(read_stage(folder))))
    return folder / PAGE_FILE


def _page(record: StageRecord) -> kit.Page:
    stage, events = record.run.stage, stage_events(record.folder)
    about = f"Page of a stage, written {kit.now()}"
    if (record.folder.parent / "report.html").is_file():
        about = Markup("{}, {}").format(about, kit.link("../report.html", "report of the run"))
    newest: dict[str, Any] = next((line for line in reversed(record.metrics) if "loss" in line), {})
    step = max(record.step, int(newest.get("step", 0)))
    lead = (
        f"Step {step} of {stage.steps}, of {stage.global_batch} samples each, at {stage.resolution} px: "
        f"{objective(record)} that trains {', '.join(stage.trains).replace('_', ' ')}."
    )
    cards = cards_section([record], all_scores=True, root="")
    sections = _metrics(record, events, newest), _samples(record), cards, _events(events), _configuration(record)
    return kit.Page(f"{record.run.name}: {record.name}", about, [kit.Text(lead, "lead"), *sections])


def objective(record: StageRecord) -> str:
    chosen = record.run.stage.objective
    return chosen.titles[chosen.kind]


def _metrics(record: StageRecord, events: list[dict[str, Any]], newest: dict[str, Any]) -> kit.Section:
    # Steps from which later attempts resumed.
    begun = [event for event in events if event.get("event") == "started" and event["job"] == record.name]
    starts = [int(event.get("from_step", 0)) for event in begun[1:]]
    charts = [*loss_charts(record), *share_charts(record), *machine_charts(record, starts)]
    if not charts:
        return kit.Section("Metrics", ["The stage has written no metrics yet."])
    legend = (
        "The horizontal dotted line shows the norm to which gradients are clipped; vertical dotted lines show steps "
        "from which an attempt resumed."
    )
    values = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in newest.items()}
    table = kit.Details("The newest line of metrics.jsonl", [kit.pairs(values)])
    return kit.Section("Metrics", [kit.Text(legend, "pale"), kit.Gallery("charts", charts), table])


def _samples(record: StageRecord) -> kit.Section:
    files = record.sheets()
    if len(files) > SHEETS:
        files = [files[round(i * (len(files) - 1) / (SHEETS - 1))] for i in range(SHEETS)]
    sheets = {f"step {step_of(file)}": file for file in files}
    figures = [kit.Figure([kit.image(file, f"samples after {at}")], at) for at, file in sheets.items()]
    legend = "The same prompts with the same noise, by the model after so many steps."
    shown: list[kit.Block] = [kit.Text(legend, "pale"), kit.Gallery("sheets", figures)]
    return kit.Section("Samples through time", shown if files else ["No sample images yet."])


def _events(events: list[dict[str, Any]]) -> kit.Section:
    if not events:
        return kit.Section(
            "Events", ["The launcher's ledger has no event of this stage: it was not started by the launcher."]
        )
    columns = ("Time", "Job", "Attempt", "Event", "Steps", "Why", "Where")
    legend = kit.Text("From the launcher's ledger; times are UTC.", "pale")
    return kit.Section("Events", [legend, kit.Table("", columns, [_event(event) for event in events])])


def _event(event: dict[str, Any]) -> list[str | kit.Cell]:
    where = event.get("nodes") or event.get("host") or ""
    return [
        kit.Cell(str(event.get("time", ""))[:19].replace("T", " "), kind="line"),
        str(event["job"]),
        str(event.get("attempt") or ""),
        str(event.get("event", "")),
        " → ".join(str(event[key]) for key in ("from_step", "to_step") if event.get(key) is not None),
        str(event.get("reason", "")),
        f"{where}, job {event['slurm']}" if event.get("slurm") else where,
    ]


def _configuration(record: StageRecord) -> kit.Section:
    environments = read_lines(record.folder / "environment.jsonl")
    attempts = [
        kit.Details(f"Attempt {n}, from step {one['from_step']}", [kit.pairs(one)], open=n == len(environments))
        for n, one in enumerate(environments, start=1)
    ]
    config = kit.Text((record.folder / "config.yaml").read_text(encoding="utf-8"), "file")
    folded = kit.Details("config.yaml with all values", [config])
    return kit.Section("Configuration and environment", [*attempts, folded])
