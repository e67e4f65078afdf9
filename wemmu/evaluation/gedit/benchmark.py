"""GEdit-Bench: edits of eleven types. A score is the mean over the types of the mean over their edits.

The intersection is the published subset that no compared model refused; the full set is all.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from wemmu.config import StageRun
from wemmu.config.benchmarks import GEditOptions
from wemmu.evaluation.benchmark import (
    BenchmarkError,
    BenchmarkRequest,
    Judged,
    Mark,
    adopted,
    by_category,
    open_image,
    published,
    title_of,
)
from wemmu.evaluation.gedit.viescore import INSTRUCTION, overall, read_prompts, understood
from wemmu.evaluation.server_benchmark import ServerBenchmark
from wemmu.images import fit

REPOSITORY = "stepfun-ai/GEdit-Bench, a data set of Hugging Face"
VIESCORE = "TIGER-AI-Lab/VIEScore (viescore/vie_prompts.py)"
COLUMNS = ("task_type", "key", "instruction", "instruction_language", "input_image_raw", "Intersection_exist")
TYPES = (
    "background_change",
    "color_alter",
    "material_alter",
    "motion_change",
    "ps_human",
    "style_change",
    "subject-add",
    "subject-remove",
    "subject-replace",
    "text_change",
    "tone_transfer",
)
INTERSECTION = "intersection"


class Edit(NamedTuple):
    """image: the file's bytes. intersection: whether the edit is in that subset."""

    type: str
    instruction: str
    image: bytes
    intersection: bool


def read_edits(files: Sequence[Path], language: str) -> dict[str, Edit]:
    """Read the edits with instructions in a language: en or cn.

    Raises:
        BenchmarkError: names the file and what it lacks.
    """
    edits: dict[str, Edit] = {}
    for file in files:
        try:
            table = _table(file)
            rows: list[dict[str, Any]] = table.filter(pc.equal(table["instruction_language"], language)).to_pylist()
            for row in rows:
                image = row["input_image_raw"]["bytes"]
                if row["task_type"] not in TYPES or not image or not row["instruction"]:
                    raise ValueError(f"the edit {row['key']} has type {row['task_type']}, or no image or instruction")
                edits[row["key"]] = Edit(row["task_type"], row["instruction"], image, bool(row["Intersection_exist"]))
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise BenchmarkError(f"{file} is not of GEdit-Bench's form: {error}; {REPOSITORY} has it") from error
    if not edits:
        raise BenchmarkError(f"{files[0].parent} holds no edits with instructions in {language}; {REPOSITORY} has them")
    return edits


def edit_files(folder: Path) -> list[Path]:
    """Return the files of the data set: a snapshot of the Hub, or what `load_dataset(...).save_to_disk` wrote.

    Raises:
        BenchmarkError: if there are none.
    """
    places = [folder, folder / "data", folder / "train"]
    if files := [file for place in places for file in sorted(place.glob("*")) if file.suffix in (".parquet", ".arrow")]:
        return files
    raise BenchmarkError(
        f"{folder} holds no *.parquet or *.arrow, nor do its folders data and train; {REPOSITORY} publishes them"
    )


def _table(file: Path) -> pa.Table:
    if file.suffix == ".parquet":
        return pq.read_table(file, columns=list(COLUMNS)).select(COLUMNS)
    with pa.OSFile(str(file)) as stream:
        return pa.ipc.open_stream(stream).read_all().select(COLUMNS)


class GEdit(ServerBenchmark):
    title = "GEdit-Bench"

    def __init__(self, options: GEditOptions, run: StageRun | None) -> None:
        self._options = options
        files = edit_files(options.data)
        prompts = published(options.viescore, "vie_prompts.py", VIESCORE, "viescore")
        self._prompts, self._edits = read_prompts(prompts, VIESCORE), read_edits(files, options.language)
        self.title = f"GEdit-Bench-{options.language.upper()}"
        super().__init__(options.judge, [*files, prompts])

    def requests(self) -> list[BenchmarkRequest]:
        return [
            BenchmarkRequest(key, edit.instruction, edit.type, key, self._options.seed, (open_image(key, edit.image),))
            for key, edit in self._edits.items()
        ]

    def adopt(self, folder: Path) -> Mapping[str, Path]:
        """Find images in the published layout: fullset/TYPE/LANGUAGE/KEY.png."""
        language = self._options.language
        return adopted({key: folder / "fullset" / e.type / language / f"{key}.png" for key, e in self._edits.items()})

    def verdict(self, judged: Judged) -> Mapping[str, float | None]:
        request = judged.request
        source, output = _same_shape(request.images[0], judged.image)
        asked = self._prompts.consistency.replace(INSTRUCTION, request.text)
        sc = self.server.ask(asked, [source, output], understood)
        pq = self.server.ask(self._prompts.quality, [output], understood)
        o = None if sc is None or pq is None else overall(sc, pq)
        return {"O": o, "SC": sc, "PQ": pq, INTERSECTION: float(self._edits[request.key].intersection)}

    @staticmethod
    def headline(marks: Sequence[Mark]) -> dict[str, float]:
        """Return G_O, G_SC and G_PQ of the full set, then of the intersection, then O of each type."""
        found: dict[str, float] = {}
        common = [mark for mark in marks if mark.values.get(INTERSECTION)]
        for name, subset in ("", marks), (", intersection", common):
            for measure in ("O", "SC", "PQ"):
                if types := by_category(subset, measure):
                    found[title_of(f"G_{measure}{name}", subset, measure, TYPES)] = sum(types.values()) / len(types)
        return {**found, **by_category(marks, "O")}


def _same_shape(source: Image.Image, output: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Return both in one size: the input's, cut to the output's shape as the model saw it.

    The publication scales the output to the input's size; where both have one shape, this does the same.
    """
    scale = min(source.width / output.width, source.height / output.height)
    width, height = max(1, round(output.width * scale)), max(1, round(output.height * scale))
    return fit(source, height, width), output.resize((width, height), Image.Resampling.BICUBIC)


BENCHMARK = GEdit
