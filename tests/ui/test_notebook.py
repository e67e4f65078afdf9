"""The notebook for the first ten minutes runs, cell by cell, on what `make demo` leaves."""

import ast
import json
from pathlib import Path

import pytest
from PIL import Image

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "first-ten-minutes.ipynb"


@pytest.mark.slow
def test_every_cell_runs_and_shows_what_its_words_say(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    names: dict[str, object] = {}
    shown = []
    for cell in cells:
        # A notebook shows the value of a cell's last expression.
        *body, last = ast.parse("".join(cell["source"])).body
        exec(compile(ast.Module(body, []), str(NOTEBOOK), "exec"), names)
        kind, tree = (
            ("eval", ast.Expression(last.value)) if isinstance(last, ast.Expr) else ("exec", ast.Module([last], []))
        )
        shown.append(eval(compile(tree, str(NOTEBOOK), kind), names))
    assert all(isinstance(image, Image.Image) for image in shown[1:])
    assert capsys.readouterr().out.count("as asked") >= 6
    assert len(names["seen"]) == names["pipe"].config.num_inference_steps
    assert [row.text.split(":")[0] for row in names["rows"]] == ["stage2", "stage4"]
