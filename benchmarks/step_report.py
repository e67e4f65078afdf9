"""Results of `benchmarks.step` as step.json, which keeps one result for each size and engine, and as step.md."""

import json
from pathlib import Path
from statistics import median
from typing import Any


def record(head: dict[str, Any], cells: list[dict[str, Any]], size: str, out: Path) -> str:
    """Put this result beside those of other sizes; returns it as text."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "step.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    results[f"{size}, {head['settings']['engine']}"] = head | {"cells": cells}
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    texts = {name: _text(name, result) for name, result in results.items()}
    (out / "step.md").write_text("\n".join(texts.values()), encoding="utf-8")
    return texts[f"{size}, {head['settings']['engine']}"]


def _text(name: str, result: dict[str, Any]) -> str:
    settings = result["settings"]
    lines = [
        f"## {name}",
        "",
        f"`{result['command']}`, {result['where']}, {settings['dtype']}, torch {result['torch']}, load "
        f"{result['load']:.1f}, {result['minutes']:.0f} minutes",
        "",
    ]
    return "\n".join(lines + [line for cell in result["cells"] for line in _cell(cell, result["rounds"])])


def _rounding(cell: dict[str, Any]) -> str:
    # Results of earlier versions do not say.
    ours, naive = cell.get("off_ours", 0.0), cell.get("off_naive", 0.0)
    return f"; in bfloat16 ours are at most {ours:.1e} off float32, the naive ones {naive:.1e}" if ours else ""


def _cell(cell: dict[str, Any], rounds: int) -> list[str]:
    """A table with a row for each variant; ratios are medians over the rounds, with the least and the most."""
    lines = [
        f"### {cell['cell']}",
        "",
        f"Floor {cell['floor'] / 1e9:.4g} GFLOP, peak {cell['peak'] / 1e9:.4g} GFLOP/s (a large product here: "
        f"{cell['rate'] / 1e9:.4g}), {rounds} rounds; condition and losses of the naive variants are at most "
        f"{cell['off']:.0e} off ours in float32{_rounding(cell)}.",
        "",
        "| variant | FLOP / floor | time / ours | CPU time / ours | step, s | MFU | the step's memory, MB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, seconds in cell["seconds"].items():
        if not seconds:
            lines.append(f"| {name} | {cell['flops'][name]:.2f} | | | | | does not fit |")
            continue
        memory = cell["memory"][name]
        cpu = _ratio(cell["cpu_seconds"], name) if "cpu_seconds" in cell else ""
        mfu = cell["floor"] / median(seconds) / cell["peak"]
        lines.append(
            f"| {name} | {cell['flops'][name]:.2f} | {_ratio(cell['seconds'], name)} | {cpu} | {median(seconds):.3g} | "
            f"{mfu:.0%} | {memory['peak'] - memory['before']:.0f} |"
        )
    shares = ", ".join(f"{kind} {share:.1%}" for kind, share in cell["profile"].items())
    return [*lines, "", f"Ours by kind of operation: {shares}.", ""]


def _ratio(seconds: dict[str, list[float]], name: str) -> str:
    if not seconds["ours"]:
        return ""
    if name == "ours":
        return "1"
    ratios = [one / ours for one, ours in zip(seconds[name], seconds["ours"], strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
