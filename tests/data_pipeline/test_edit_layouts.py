"""Edit sets as they are published: UniWorld-V1, ImgEdit, OmniEdit, MagicBrush; with the configs of docs/data.md."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.records import RawRecord, Reason, Rejection
from tests.data_pipeline.reading import read_all, reasons, records
from wemmu.config import Task
from wemmu.config.prepare import EditsSource, FolderSource

BOM = b"\xef\xbb\xbf"
# The published set -> its example in the docs.
TOLD = {
    name: yaml.safe_load(example)
    for name, example in re.findall(r"\| (\S+) \|.*`(\{kind: edits.*?\})`", Path("docs/data.md").read_text())
}
TURNS = [{"from": "human", "value": "<image>\nAdd a hat"}, {"from": "gpt", "value": "<image>"}]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jpg").write_bytes(name.encode())
    return tmp_path


def read(published: str, path: Path) -> list[RawRecord | Rejection]:
    told = TOLD[published] | {"path": str(path)}
    return read_all(EditsSource.model_validate({k: v for k, v in told.items() if k != "root"}))


def uniworld(*changes: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"id": 1, "image": ["a.jpg", "b.jpg"], "conversations": TURNS} | change for change in changes]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("start", [b"", BOM, b"\n "])
def test_uniworld_is_a_json_array_of_conversations(root: Path, indent: int | None, start: bytes) -> None:
    two = [{"from": "human", "value": "<image> and <image>\nMix them"}, {"from": "gpt", "value": "<image>"}]
    rows = uniworld({}, {"image": ["a.jpg", "c.jpg", "b.jpg"], "conversations": two})
    (root / "u.json").write_bytes(start + json.dumps(rows, indent=indent).encode())
    one, several = read("UniWorld-V1", root / "u.json")
    assert (one.key, one.task, one.prompt) == ("u.json/1", Task.EDIT, "Add a hat")
    assert ([p.data for p in one.images], one.target.data) == ([b"a"], b"b")
    assert (several.task, several.prompt) == (Task.MULTI_EDIT, "and Mix them")
    assert ([p.data for p in several.images], several.target.data) == ([b"a", b"c"], b"b")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"conversations": TURNS * 2}, "turns human, gpt, human, gpt"),
        ({"conversations": [TURNS[0], {"from": "gpt", "value": "A hat."}]}, "is text, not an image"),
        ({"image": ["a.jpg", "c.jpg", "b.jpg"]}, "marks 1 images, the record has 2"),
        ({"image": ["a.jpg"]}, "image is missing"),
        ({"image": []}, "image is missing"),
    ],
)
def test_what_is_no_edit_is_left_out_with_the_reason(root: Path, change: dict[str, Any], said: str) -> None:
    (root / "u.json").write_text(json.dumps(uniworld(change, {})))
    bad, good = read("UniWorld-V1", root / "u.json")
    assert (bad.reason, good.prompt) == (Reason.BAD_RECORD, "Add a hat")
    assert said in bad.detail


@pytest.mark.parametrize(
    ("value", "said"), [({"src": "a.jpg"}, "a struct of src"), (True, "bool"), ([["a.jpg"]], "list")]
)
def test_an_image_of_no_known_form_is_told_with_its_field(root: Path, value: Any, said: str) -> None:
    rows = [{"input": value, "target": "b.jpg"}, {"input": {"path": "a.jpg"}, "target": {"path": "b.jpg"}}]
    (root / "e.jsonl").write_text("".join(json.dumps(row | {"instruction": "Go"}) + "\n" for row in rows))
    bad, good = read_all(EditsSource(kind="edits", name="e", path=str(root / "e.jsonl")))
    assert bad.detail == f"e.jsonl/1:input: {said}, neither bytes nor a path"
    assert (good.images[0].data, good.target.data) == (b"a", b"b")


def test_imgedit_has_lists_of_one(root: Path) -> None:
    row = {"input_images": ["a.jpg"], "output_images": ["b.jpg"], "prompt": "Add a hat"}
    rows = [row, row | {"output_images": ["b.jpg", "c.jpg"]}]
    (root / "i.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = read("ImgEdit", root / "i.jsonl")
    assert [(r.task, r.prompt, r.images[0].data, r.target.data) for r in records(found)] == [
        (Task.EDIT, "Add a hat", b"a", b"b")
    ]
    assert reasons(found) == {"i.jsonl/2": Reason.BAD_RECORD}


def test_omniedit_and_magicbrush_are_parquet_of_two_images(root: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    before, after = (pa.array([{"bytes": b, "path": ""}] * 8 + [None], kind) for b in (b"a", b"b"))
    said = [["Add a hat to the man", "Add a hat"]] * 9
    omni = {"omni_edit_id": ["x"] * 9, "src_img": before, "edited_img": after, "edited_prompt_list": said}
    brush = {"source_img": before, "mask_img": before, "target_img": after, "instruction": [s[1] for s in said]}
    for name, table, prompts in (("OmniEdit", omni, set(said[0])), ("MagicBrush", brush, {"Add a hat"})):
        pq.write_table(pa.table(table), root / "o.parquet", row_group_size=4)
        found = read(name, root / "o.parquet")
        edits = [(r.task, [p.data for p in r.images], r.target.data) for r in records(found)]
        assert edits == [(Task.EDIT, [b"a"], b"b")] * 8
        assert {r.prompt for r in records(found)} == prompts
        assert reasons(found) == {"o.parquet/8": Reason.BAD_RECORD}


@given(
    rows=st.lists(
        st.fixed_dictionaries({"image": st.text(max_size=5), "x": st.recursive(st.integers(), st.lists)}), max_size=9
    ),
    size=st.integers(1, 4),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_parts_of_an_array_are_every_element_once(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict], size: int, indent: int | None, ascii_only: bool
) -> None:
    path = tmp_path_factory.mktemp("array") / "a.json"
    text = json.dumps([row | {"image": row["image"] or "."} for row in rows], indent=indent, ensure_ascii=ascii_only)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    config = FolderSource(kind="folder", name="dir", path=str(path), caption=None)
    assert [item.key for item in read_all(config, size)] == [f"a.json/{n}" for n in range(1, len(rows) + 1)]


@pytest.mark.parametrize("cut", [b"[{", b'[{"image": "a"}', b'[{"image": "a"} {}]', b'[{"image": "a"}] {}', b"[{]"])
def test_an_array_that_is_not_whole_is_a_lost_container(tmp_path: Path, cut: bytes) -> None:
    (tmp_path / "a.json").write_bytes(cut)
    found = read_all(FolderSource(kind="folder", name="dir", path=str(tmp_path / "a.json"), caption=None))
    assert list(reasons(found).values()) == [Reason.BAD_CONTAINER]
