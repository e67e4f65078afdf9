"""Checks a stage before the next one starts. Reads files, computes nothing."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wemmu.config.benchmarks import RESULTS, card_file
from wemmu.config.checkpoints import says_its_step
from wemmu.config.stage import BenchmarkGate
from wemmu.jsonlines import read_lines
from wemmu.readable import valid


@dataclass(frozen=True)
class Gate:
    """folder: of the stage that ended. manifest: of its last checkpoint. modules: what it trained -> how the names of
    its weights begin.

    max_loss, scores and benchmarks: see `wemmu.config.stage.Gate`.
    """

    stage: str
    folder: Path
    manifest: Path
    modules: Mapping[str, tuple[str, ...]]
    max_loss: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    benchmarks: Sequence[BenchmarkGate] = ()


def reasons(gate: Gate) -> list[str]:
    """Return the reasons why the next stage may not begin, each a sentence; empty if it may."""
    return [*_of_checkpoint(gate), *_of_record(gate), *_of_scores(gate), *_of_benchmarks(gate)]


def _of_checkpoint(gate: Gate) -> Iterator[str]:
    try:
        manifest = json.loads(gate.manifest.read_text(encoding="utf-8"))
        names, files = list(manifest["tensors"]), dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"{gate.stage} has no whole checkpoint of its last step: {gate.manifest} cannot be read ({error})."
        return
    if not says_its_step(gate.manifest.parent):
        yield f"{gate.manifest.parent} holds step {manifest.get('step')}: {gate.stage} has not ended."
    if lacking := [module for module, begin in gate.modules.items() if not any(n.startswith(begin) for n in names)]:
        yield f"{gate.stage} trained {', '.join(lacking)}, but {gate.manifest} lists no weights of it."
    if gone := [name for name, sha256 in files.items() if not sha256 or not (gate.manifest.parent / name).is_file()]:
        yield f"{gate.manifest.parent} lacks {gone[0]}" + (f" and {len(gone) - 1} more files." if gone[1:] else ".")


def _of_record(gate: Gate) -> Iterator[str]:
    record = gate.folder / "metrics.jsonl"
    lines = read_lines(record)
    loss = next((line["loss"] for line in reversed(lines) if "loss" in line), None)
    if loss is None:
        yield f"{gate.stage} has no loss in {record}."
    elif not math.isfinite(loss):
        yield f"{gate.stage} ended with a loss that is not finite ({loss})."
    elif gate.max_loss is not None and loss > gate.max_loss:
        yield f"{gate.stage} ended with a loss of {loss:.4f}; its gate.max_loss is {gate.max_loss:g}."
    # Earlier versions recorded `pictures` and `blank_pictures`.
    lines = [{name.replace("picture", "image"): value for name, value in line.items()} for line in lines]
    drawn = next((line for line in reversed(lines) if "blank_images" in line), None)
    if drawn is not None and drawn["blank_images"]:
        yield (
            f"{drawn['blank_images']} of the {drawn['images']} sample images of {gate.stage} at step "
            f"{drawn['step']} are blank: every pixel has one colour. Look at {gate.folder / 'samples'}."
        )


def _of_scores(gate: Gate) -> Iterator[str]:
    if not gate.scores:
        return
    file = gate.folder / RESULTS
    try:
        tasks = json.loads(file.read_text(encoding="utf-8"))["tasks"]
        # The first measure of a task says whether a request was answered.
        shares = {task: next(iter(tasks[task]["test"]["measures"].values())) for task in gate.scores}
    except (OSError, ValueError, KeyError, StopIteration) as error:
        yield f"{gate.stage} has a gate on its scores, but {file} does not tell them ({type(error).__name__}: {error})."
        return
    for task, lowest in gate.scores.items():
        share = shares[task]["share"]
        if share < lowest:
            of = f"{shares[task]['successes']} of {shares[task]['count']}"
            yield f"{gate.stage} answered {share:.2f} of {task} ({of}); its gate asks for {lowest:g}."


def _of_benchmarks(gate: Gate) -> Iterator[str]:
    for bound in gate.benchmarks:
        file = card_file(gate.folder, bound.benchmark)
        try:
            card = json.loads(file.read_text(encoding="utf-8"))
            scores = {name: float(score["value"]) for name, score in card["scores"].items()}
            name = bound.score or next(iter(scores))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
            why = f"{type(error).__name__}: {error}"
            yield f"{gate.stage} has a gate on {bound.benchmark}, but {file} has no scores ({why})."
            continue
        if name not in scores:
            there = valid(name, scores, f"the scores in {file}")
            yield f"{gate.stage} has a gate on {name} of {bound.benchmark}; {there}."
            continue
        value = scores[name]
        asks = f"{gate.stage} has {name} {value:.4g} in {bound.benchmark}; its gate asks for"
        # Written so that a score that is not a number passes no bound.
        if bound.at_least is not None and not value >= bound.at_least:
            yield f"{asks} {bound.at_least:g} or more."
        if bound.at_most is not None and not value <= bound.at_most:
            yield f"{asks} {bound.at_most:g} or less."
