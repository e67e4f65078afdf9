"""VIEScore of edits (arXiv 2312.14867): a VLM gives semantic consistency (SC) and perceptual quality (PQ), 0 to 10.

Each is the lower of two numbers, and O = sqrt(SC PQ). The prompts are read from the published vie_prompts.py, not run.
"""

import ast
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

from wemmu.evaluation.benchmark import BenchmarkError

HIGHEST = 10
# The parts of a prompt in vie_prompts.py, as the published code joins them for edits by text.
SC = ("_context_no_delimit", "_prompts_0shot_two_image_edit_rule", "_prompts_0shot_tie_rule_SC")
PQ = ("_context_no_delimit", "_prompts_0shot_rule_PQ")
INSTRUCTION = "<instruction>"
_LIST = re.compile(r"\[[^\[\]]*\]")


class Prompts(NamedTuple):
    """consistency: `INSTRUCTION` stands for the edit's."""

    consistency: str
    quality: str


def read_prompts(file: Path, repository: str) -> Prompts:
    """Raise BenchmarkError if the file lacks a part."""
    try:
        nodes = ast.parse(file.read_text(encoding="utf-8")).body
        texts = {
            target.id: ast.literal_eval(node.value)
            for node in nodes
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        prompts = Prompts(*("\n".join(texts[name] for name in parts) for parts in (SC, PQ)))
    except (SyntaxError, KeyError, ValueError, TypeError) as error:
        raise BenchmarkError(f"{file} is not VIEScore's ({error!r}); {repository} has it") from error
    if INSTRUCTION not in prompts.consistency:
        raise BenchmarkError(f"{file}: {SC[-1]} has no {INSTRUCTION}; {repository} has it")
    return prompts


def understood(text: str) -> float | None:
    """Return the lower of the two numbers of an answer; None unless it gives two from 0 to 10.

    An answer is JSON with a `score`, or the list alone. The published code guesses a number where it finds none.
    """
    begin, end = text.find("{"), text.rfind("}") + 1
    try:
        found = json.loads(text[begin:end], strict=False)["score"]
    except (ValueError, KeyError, TypeError):
        lists = _LIST.findall(text)
        try:
            found = json.loads(lists[0]) if len(lists) == 1 else None
        except ValueError:
            return None
    numbers = found if isinstance(found, list) else []
    valid = [n for n in numbers if isinstance(n, int | float) and not isinstance(n, bool) and 0 <= n <= HIGHEST]
    return float(min(valid)) if len(valid) == len(numbers) == 2 else None


def overall(consistency: float, quality: float) -> float:
    return math.sqrt(consistency * quality)
