"""WISE's prompt for the judge, read from the published gpt_eval.py without running it: no licence allows a copy."""

import ast
from collections.abc import Iterator
from pathlib import Path

from wemmu.evaluation.benchmark import BenchmarkError

FUNCTION = "build_evaluation_messages"
FIELDS = {"Prompt", "Explanation"}


class JudgePrompt:
    """The published messages `system` and `user`; `user` contains the fields of a prompt."""

    def __init__(self, file: Path, repository: str) -> None:
        """Raise BenchmarkError if the file does not hold them."""
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
            function = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == FUNCTION)
            messages = dict(_messages(function))
            self.system, self._user = _text(messages["system"]), list(_parts(messages["user"]))
            if {field for _, field in self._user if field} != FIELDS:
                raise ValueError(f"the user's message does not name {' and '.join(sorted(FIELDS))}")
        except (SyntaxError, StopIteration, KeyError, ValueError) as error:
            raise BenchmarkError(
                f"{file} has no function {FUNCTION} of the published form ({error!r}); {repository} has it"
            ) from error

    def user(self, prompt: str, explanation: str) -> str:
        fields = {"Prompt": prompt, "Explanation": explanation}
        return "".join(fields.get(field, text) for text, field in self._user)


def _messages(function: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Yield role and text of each message."""
    for node in ast.walk(function):
        if isinstance(node, ast.Dict) and "role" in (own := _entries(node)):
            inner = (_entries(one) for one in ast.walk(node) if isinstance(one, ast.Dict))
            yield _text(own["role"]), next(one["text"] for one in inner if "text" in one)


def _entries(node: ast.Dict) -> dict[str, ast.expr]:
    return {_text(key): value for key, value in zip(node.keys, node.values, strict=True)}


def _parts(node: ast.expr) -> Iterator[tuple[str, str]]:
    """Yield text and "", or "" and the name of a field: Prompt for `{prompt_data['Prompt']}`."""
    for value in node.values if isinstance(node, ast.JoinedStr) else [node]:
        if not isinstance(value, ast.FormattedValue):
            yield _text(value), ""
        elif isinstance(value.value, ast.Subscript):
            yield "", _text(value.value.slice)
        else:
            raise ValueError(f"{ast.unparse(value.value)} is not a field of a prompt")


def _text(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError(f"{ast.unparse(node) if node else 'an unpacked dict'} is not a text")
