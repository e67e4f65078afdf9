"""The report of a run: RUN/report.html and RUN/samples.png."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from wemmu.config.benchmarks import card_folder
from wemmu.config.files import replace_text, replacing
from wemmu.config.task import TASK_NAMES
from wemmu.evaluation.benchmark_page import cards_section
from wemmu.evaluation.run_charts import SPLITS, loss_charts, score_charts
from wemmu.evaluation.run_record import RunRecord, StageRecord, read_run
from wemmu.evaluation.run_samples import samples_section, sheet, split_words
from wemmu.evaluation.scores import HEADLINE
from wemmu.evaluation.stage_page import objective, write_page
from wemmu.readable import duration, human, listed, percent
from wemmu.report import page as kit
from wemmu.revision import revision

REPORT_FILE, SHEET_FILE = "report.html", "samples.png"
_SHORT = {"vlm": "VLM", "llm": "LLM", "vae": "VAE", "dit": "DiT", "mlp": "MLP"}
MEASURES = {
    "satisfied": "the image shows exactly what the caption says",
    "same": "the scene came out again",
    "readable": "the image is a scene of the world",
    "correct": "the instruction was followed and the rest preserved",
    "followed": "the named part is as asked",
    "preserved": "everything else is unchanged",
    "right": "the answer is correct, word by word",
    "restored": "the scorer reads the scene from the reconstruction",
    "copied": "the output equals the input: the instruction was ignored",
}
NONE = kit.Cell("–", kind="pale")


def write_report(folder: Path) -> tuple[Path, Path]:
    """Write the report and the sample sheet of a run folder, and the pages of its stages; return the first two paths.

    Raises:
        ReportError: if the folder holds no stage.
    """
    record = read_run(folder)
    with replacing(folder / SHEET_FILE) as aside:
        sheet(record).save(aside, "PNG")
    replace_text(folder / REPORT_FILE, kit.html(_page(record)))
    # After the report, so that they link to it.
    for stage in record.stages:
        write_page(stage.folder)
    return folder / REPORT_FILE, folder / SHEET_FILE


def _page(record: RunRecord) -> kit.Page:
    links = [kit.link(f"{stage.folder.name}/index.html", stage.name) for stage in record.stages]
    pages = Markup("Pages of the stages: {}.").format(Markup(", ").join(links))
    shards = record.stages[0].run.data.shards
    if (shards / REPORT_FILE).is_file():
        address = os.path.relpath((shards / REPORT_FILE).resolve(), record.folder.resolve())
        pages += Markup(" {} has one, too.").format(kit.link(address, "The data set"))
    blocks: list[kit.Block] = [
        kit.Text(opening(record), "lead"),
        pages,
        kit.Notes("Not everything is here.", missing(record)),
    ]
    sections = (samples_section, _scores, _cards, _losses, _modules, _time, _data, _configuration)
    about = f"Report of a run, written {kit.now()}"
    return kit.Page(record.stages[0].run.name, about, [*blocks, *(describe(record) for describe in sections)])


def opening(record: RunRecord) -> str:
    """Return one sentence: what was trained, and from which weights."""
    stages = record.stages
    count = f"{len(stages)} stage{'s' if len(stages) > 1 else ''}"
    steps = listed([str(stage.run.stage.steps) for stage in stages])
    given = [stage for stage in stages if stage.given_start]
    if not given:
        return f"The bridge was trained from zero, through {count} of {steps} steps."
    if len(given) == len(stages):
        longer = [str(stage.start_manifest["step"]) for stage in given if stage.start_manifest]
        of = f" of {listed(longer)} steps" if len(longer) == len(given) else ""
        return (
            f"This run continued shipped weights of a longer run{of} for {steps} steps in its {count}. Most of what "
            "the images show was learned in that longer run."
        )
    return (
        f"Of {count} ({steps} steps), {listed([s.name for s in given])} started from weights named in the curriculum "
        "and not from the previous stage."
    )


def missing(record: RunRecord) -> list[str]:
    """Return what is missing for a whole run, in sentences."""
    notes = []
    for stage in record.stages:
        steps = stage.run.stage.steps
        if stage.manifest is None:
            notes.append(f"{stage.name} has not been trained: it has no checkpoint.")
        elif stage.step < steps:
            notes.append(f"{stage.name} is not finished: its newest checkpoint is of step {stage.step} of {steps}.")
        if stage.manifest and not stage.metrics:
            notes.append(f"{stage.name} has no metrics.jsonl, so its losses are not known.")
        if stage.manifest and stage.results is None and stage.run.evaluation.prompts:
            notes.append(f"{stage.name} has not been evaluated.")
        elif stage.results and (at := stage.results.get("checkpoint", {}).get("step", stage.step)) != stage.step:
            notes.append(f"The scores of {stage.name} are of step {at}, its newest checkpoint is of step {stage.step}.")
        named = stage.run.evaluation.after(stage.run.stage)
        if stage.manifest and (absent := [name for name in named if str(card_folder(Path(), name)) not in stage.cards]):
            notes.append(f"{stage.name} lacks the result cards of {listed(absent)}.")
    if not record.timings:
        notes.append("The launcher's ledger is missing or empty, so times are not known.")
    if record.data is None:
        notes.append(f"The data set {record.stages[0].run.data.shards} does not exist, so it is not described.")
    if record.curriculum is None:
        notes.append("curriculum.yaml is missing or cannot be read.")
    return notes


def _scores(record: RunRecord) -> kit.Section | str:
    stages = record.stages
    rows = []
    for task, measure in HEADLINE.items():
        for split in SPLITS:
            parts = [(stage.results or {"tasks": {}})["tasks"].get(task, {}).get(split) for stage in stages]
            if any(parts):
                cells = [_share(part and part["measures"][measure]) for part in parts]
                rows.append([kit.Cell(TASK_NAMES[task], split_words(task, split)), *cells])
    if not rows:
        return ""
    words = (
        "Share of held-out requests that were answered correctly, with the 95 % Wilson interval and the number of "
        "requests. Every stage was asked the same requests. A dash means that the stage does not know the task or was "
        "not evaluated."
    )
    columns: tuple[str | kit.Cell, ...] = (
        "Task",
        *(kit.Cell(stage.name, f"{stage.run.stage.resolution} px") for stage in stages),
    )
    charts = kit.Gallery("charts", score_charts(stages))
    details = _details(next(stage for stage in reversed(stages) if stage.results))
    return kit.Section("Exact scores", [words, charts, kit.Table("", columns, rows), details])


def _cards(record: RunRecord) -> kit.Section | str:
    return cards_section(record.stages, all_scores=False)


def _share(share: dict[str, Any] | None) -> kit.Cell:
    if not share:
        return NONE
    interval = f"{100 * share['low']:.1f}–{100 * share['high']:.1f}, of {share['count']}"
    return kit.Cell(percent(share["share"]), interval, "line")


def _details(stage: StageRecord) -> kit.Details:
    """Return all measures of an evaluated stage, in total and by group."""
    results = stage.results or {}
    meanings = " ".join(f"{measure}: {meaning}." for measure, meaning in MEASURES.items())
    tables = [
        kit.Table(
            f"{TASK_NAMES[task]}: {SPLITS[split]}",
            ("", *part["measures"]),
            [
                [group, *(_share(shares[measure]) for measure in part["measures"])]
                for group, shares in {"all": part["measures"], **part["by"]}.items()
            ],
        )
        for task, by_split in results["tasks"].items()
        for split, part in by_split.items()
    ]
    steps = "in {steps} {name} steps ".format(**results["solver"]) if "solver" in results else ""
    drawn = f"Drawn {steps}at {results['resolution']} px with seed {results['seed']}."
    guidance = [
        f"{task} ({', '.join(f'{branch} {weight:g}' for branch, weight in weights.items())})"
        for task, weights in results.get("guidance", {}).items()
    ]
    drawn += f" Weights of the guidance branches: {'; '.join(guidance)}." if guidance else ""
    title = f"Every measure after {stage.name}, by kind of request"
    return kit.Details(title, [kit.Text(meanings, "pale"), *tables, kit.Text(drawn, "pale")])


def _losses(record: RunRecord) -> kit.Section:
    charts = []
    for one in record.stages:
        stage = one.run.stage
        about = f"{objective(one)}, {stage.resolution} px, {stage.steps} steps of {stage.global_batch}"
        charts += [kit.Gallery("charts", drawn, one.name, about)] if (drawn := loss_charts(one)) else []
    legend = kit.Text("The dotted line is the norm to which gradients are clipped.", "pale")
    return kit.Section("Losses", [legend, *charts] if charts else ["No stage has written metrics yet."])


def _modules(record: RunRecord) -> kit.Section:
    stages = record.stages
    parts = dict.fromkeys(part for stage in stages for part in stage.run.recipe.parts)
    rows: list[list[str | kit.Cell]] = [[_label(part), *(_module(stage, part) for stage in stages)] for part in parts]
    rows = [row for row in rows if any(cell is not NONE for cell in row[1:])]
    starts: list[list[str | kit.Cell]] = []
    for before, stage in zip((None, *stages), stages, strict=False):
        start = kit.Cell(before.name if before else "the backbones")
        if stage.given_start:
            of = stage.start_manifest
            words = f"weights of {of['stage']} after {of['step']} steps of an earlier run" if of else ""
            start = kit.Cell(kit.code(stage.given_start), words)
        starts.append([stage.name, start, f"step {stage.step} of {stage.run.stage.steps}"])
    read = "Read from the manifests of the newest checkpoints; a frozen part shows the beginning of its hash."
    modules = kit.Table("", ("Module", *(stage.name for stage in stages)), rows)
    return kit.Section(
        "Frozen and trained weights",
        [f"{_frozen(stages)} {read}", modules, kit.Table("", ("Stage", "Began from", "Reached"), starts)],
    )


def _module(stage: StageRecord, part: str) -> kit.Cell:
    """Return whether a stage trained a backbone or module of the recipe, and its number of parameters."""
    if stage.manifest is None:
        return NONE
    if part in stage.manifest["frozen"]:
        return kit.Cell("frozen", kit.code(stage.manifest["frozen"][part][:10]), "pale")
    prefixes = stage.run.recipe.modules.get(part, ())
    tensors = {n: shape for n, shape in stage.manifest["tensors"].items() if n.startswith(prefixes)}
    if not tensors:
        return NONE
    parameters = human(sum(math.prod(shape) for shape in tensors.values()))
    trained = any(name in tensors for name in stage.manifest["trained"])
    return kit.Cell("trained", parameters, "strong") if trained else kit.Cell("kept as it was", parameters)


def _label(part: str) -> str:
    """`vae_branch` -> VAE branch."""
    words = " ".join(_SHORT.get(word, word) for word in part.split("_"))
    return words[0].upper() + words[1:]


def _frozen(stages: Sequence[StageRecord]) -> str:
    manifests = [stage.manifest for stage in stages if stage.manifest]
    if not manifests:
        return "There is no checkpoint yet."
    always = [part for part in manifests[0]["frozen"] if all(part in m["frozen"] for m in manifests)]
    changed = [part for part in always if len({m["frozen"][part] for m in manifests}) > 1]
    names = listed([_label(part) for part in changed or always])
    if changed:
        return f"Not the same in all stages, although frozen: {names}."
    return f"Frozen in every stage, and by SHA-256 the same weights in each: {names or 'nothing'}."


def _time(record: RunRecord) -> kit.Section:
    timings = record.timings
    if not timings:
        return kit.Section("Wall time", ["Not known."])
    longest = max(one.seconds for one in timings) or 1.0
    rows = [
        (one.job, duration(one.seconds), kit.Cell(bar=one.seconds / longest), str(one.attempts), one.outcome)
        for one in timings
    ]
    total = ("all", duration(sum(one.seconds for one in timings)), "", "", "")
    return kit.Section("Wall time", [kit.Table("", ("Part", ">Time", "", "Attempts", "Last one"), [*rows, total])])


def _data(record: RunRecord) -> kit.Section:
    if record.data is None:
        return kit.Section("Data", ["Not known."])
    rows = []
    for stream in record.data.streams:
        of = stream.settings
        latents = of.latents.dtype if of.latents else "none"
        size = f"{of.height} × {of.width} px"
        rows.append([TASK_NAMES[of.task], size, f"{stream.samples:,}", human(stream.bytes, "B"), latents])
    return kit.Section("Data", [kit.Table("", ("Task", "Size", ">Samples", ">Shards", "Stored latents"), rows)])


def _configuration(record: RunRecord) -> kit.Section:
    manifest = next((stage.manifest for stage in reversed(record.stages) if stage.manifest), None)
    code = revision()
    commit = code.commit + " with uncommitted changes" * code.dirty if code else "unknown: not a git checkout"
    environment = {"git commit, when this was written": commit, **(manifest["libraries"] if manifest else {})}
    file = record.folder / "curriculum.yaml"
    blocks: list[kit.Block] = [kit.pairs(environment)]
    if file.is_file():
        config = kit.Text(file.read_text(encoding="utf-8"), "file")
        blocks.append(kit.Details("curriculum.yaml with all values", [config]))
    return kit.Section("Configuration and environment", blocks)
