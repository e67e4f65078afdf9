"""Every benchmark by its command on an export: published files, tiny judges of the real classes, a judge server."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.backbones.test_encoders import make_folder
from tests.data.handmade import all_tasks, write
from tests.evaluation.conftest import server  # noqa: F401
from tests.evaluation.servers import Server, says
from tests.evaluation.test_geneval import chosen, detector  # noqa: F401
from tests.evaluation.test_server_judges import VERDICT, dpg_file, imgedit_files  # noqa: F401
from tests.evaluation.test_unified_bench import images  # noqa: F401
from tests.evaluation.test_wise_gedit import NUMBERS, gedit_files, wise_files  # noqa: F401
from wemmu import compare, evaluate
from wemmu.config.benchmarks import OPTIONS
from wemmu.config.task import Task
from wemmu.evaluation.card import read_card
from wemmu.pipeline import WeMMUPipeline

# Options from the folder of published files; name of the fixture that writes them.
Options = Callable[[Path], dict[str, object]]


def _encoders(folder: Path) -> dict[str, object]:
    kinds = {"clip": "clip", "longclip": "clip", "dinov2": "dinov2", "dinov3": "dinov3"}
    return {f"encoders.{name}": make_folder(kind, folder / "encoders" / name) for name, kind in kinds.items()}


def _captions(folder: Path, *names: str) -> dict[str, object]:
    for name in names:
        lines = [json.dumps({"image": f"{n}.jpg", "caption": f"{name} {n}"}) for n in (0, 2, 10)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return {"captions": folder / f"{names[0]}.jsonl"}


def _fidelity(folder: Path) -> dict[str, object]:
    write(folder / "shards", all_tasks({Task.T2I: 12, Task.EDIT: 12}))
    clip = {"encoders.clip": "assets/shapes/encoders/clip"}
    return {"shards": folder / "shards", "resolution": 32, "validation": 2, **clip}


# Case -> benchmark, fixture of its files, its options, main score, images.
CASES: dict[str, tuple[str, str, Options, str, int]] = {
    "shapes": ("shapes", "tmp_path", lambda _: {"prompts": 1}, "correct", 4),
    "fidelity": ("fidelity", "tmp_path", _fidelity, "psnr", 4),
    "geneval": (
        "geneval",
        "chosen",
        lambda f: {"data": f / "geneval", "clip": "assets/shapes/encoders/clip", "images": 2},
        "GenEval",
        12,
    ),
    "dpg": ("dpg", "dpg_file", lambda f: {"data": f, "images": 1}, "DPG-Bench", 2),
    "wise": ("wise", "wise_files", lambda f: {"data": f}, "WiScore", 7),
    "imgedit": ("imgedit", "imgedit_files", lambda f: {"data": f, "images": f / "images"}, "ImgEdit-Bench", 3),
    "gedit en": ("gedit", "gedit_files", lambda f: {"data": f, "viescore": f}, "G_O", 12),
    "gedit cn": ("gedit", "gedit_files", lambda f: {"data": f, "viescore": f, "language": "cn"}, "G_O", 12),
    "unified": (
        "unified_bench",
        "images",
        lambda f: {"data": f / "Image", **_encoders(f), **_captions(f, "ours")},
        "Unified-Score",
        3,
    ),
    "captions": (
        "unified_bench_captions",
        "images",
        lambda f: {"data": f / "Image", **_captions(f, "ours", "theirs"), "rivals.theirs": f / "theirs.jsonl"},
        "win rate",
        3,
    ),
}


def _reply(text: str, _: int) -> tuple[int, object, float]:
    """Answer in the form that the question's benchmark asks for."""
    forms = {
        r"Answer with yes or no": "yes",
        r"EXPLANATION": NUMBERS.format(2, 1, 0),
        r"^Judge this": VERDICT.format(5, 4, 3),
        r"^Compare two captions": "T",
    }
    return says(next((answer for form, answer in forms.items() if re.search(form, text)), "[6, 7]"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_benchmark_scores_an_export(
    case: str,
    exported: Path,
    pipe: WeMMUPipeline,
    server: Server,  # noqa: F811
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    name, files, options, score, count = CASES[case]
    given = request.getfixturevalue(files)
    server.replies = _reply
    values = options(tmp_path)
    if "judge" in OPTIONS[name].model_fields:
        values |= {"judge.url": server.options(tmp_path).url, "judge.model": "judge", "judge.cache": tmp_path / "cache"}
    if name == "geneval":
        values["detector"] = given.detector
    source = tmp_path / "Image" if name == "unified_bench_captions" else exported
    pairs = [f"{key}={value}" for key, value in ({"resamples": 20} | values).items()]
    evaluate.main(source, benchmark=name, set_=pairs, out=tmp_path / "out")
    card, marks = read_card(tmp_path / "out")
    assert (card["score"], card["n"], card["failures"]) == (score, count, 0)
    assert card["judges"]
    # Once more costs no image and no question.
    asked = len(server.asked)
    evaluate.main(source, benchmark=name, set_=pairs, out=tmp_path / "out")
    assert len(server.asked) == asked
    assert read_card(tmp_path / "out")[0]["scores"] == card["scores"]
    compare.main(tmp_path / "out", tmp_path / "out" / "card.json")
    if source is not exported:
        return
    assert card["settings"]["sampling"]["num_inference_steps"] == 3
    # What is kept is what the pipeline makes of the published prompt.
    line = json.loads((tmp_path / "out" / "requests.jsonl").read_text().splitlines()[-1])
    inputs = [Image.open(tmp_path / "out" / "inputs" / f"{line['key']}_{n}.png") for n in range(line["inputs"])]
    kept = Image.open(tmp_path / "out" / "images" / f"{line['key']}.png")
    drawn = pipe([line["text"]], image=[inputs], height=kept.height, width=kept.width, seed=[line["seed"]]).images[0]
    assert np.abs(np.array(drawn, int) - np.array(kept, int)).max() <= 2
    assert len({(tmp_path / "out" / "images" / f"{mark.key}.png").read_bytes() for mark in marks}) == count
    if name == "geneval":
        # The detector sees benches everywhere and no cow.
        assert (card["scores"]["single_object"]["value"], card["scores"]["two_object"]["value"]) == (1, 0)
        # The same images in the published layout: FOLDER/samples/NUMBER.png.
        for mark in marks:
            file = tmp_path / "theirs" / mark.unit / "samples" / f"{mark.key[6:]}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "out" / "images" / f"{mark.key}.png", file)
        evaluate.main(tmp_path / "theirs", benchmark=name, set_=pairs, out=tmp_path / "adopted")
        assert read_card(tmp_path / "adopted")[0]["scores"] == card["scores"]
