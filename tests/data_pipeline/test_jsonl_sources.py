"""Image folders and edits that JSONL files list."""

import base64
import json
import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.records import RawRecord, Reason, Rejection
from data_pipeline.sources import open_source
from tests.data_pipeline import broken
from tests.data_pipeline.reading import read_all, reasons, records
from wemmu.config import ConfigError, Task
from wemmu.config.prepare import EditsSource, FolderSource


def folder(path: Path | str, **options: Any) -> FolderSource:
    return FolderSource(kind="folder", name="dir", path=str(path), **options)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder, with something beside it, of three images."""
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    for name in ("1.jpg", "2.jpg", "a/3.jpg"):
        (root / name).write_bytes(name.encode())
    (tmp_path / "outside.jpg").write_bytes(b"secret")
    return root


def read_lines(beside: Path, *lines: bytes | dict[str, Any], **options: Any) -> list[RawRecord | Rejection]:
    broken.write_lines(beside / "list.jsonl", lines)
    return read_all(folder(beside / "list.jsonl", **options))


def read_edits(root: Path, *lines: dict[str, Any]) -> list[RawRecord | Rejection]:
    broken.write_lines(root / "edits.jsonl", lines)
    return read_all(EditsSource(kind="edits", name="edits", path=str(root / "edits.jsonl")))


def test_a_record_is_a_line(root: Path) -> None:
    found = read_lines(root, {"image": "1.jpg", "caption": "one"}, b"", {"image": "a/3.jpg"}, {"image": "a/../2.jpg"})
    assert [(r.key, r.task, r.prompt, r.images) for r in found] == [
        ("list.jsonl/1", Task.T2I, "one", ()),
        ("list.jsonl/3", Task.T2I, None, ()),
        ("list.jsonl/4", Task.T2I, None, ()),
    ]
    assert [r.target.data for r in found] == [b"1.jpg", b"a/3.jpg", b"2.jpg"]


def test_images_may_be_base64(root: Path) -> None:
    """Alone and in lists, as a data URL or bare. What only begins so is named by its beginning."""
    images = [broken.encode(Image.new("RGB", (9, 9)), kind) for kind in ("JPEG", "PNG", "WEBP")]
    said = [base64.b64encode(image).decode() for image in images]
    url = f"data:image/jpeg;base64,{said[0]}"
    lines = ({"image": image} for image in (*said, url, [url], url + "*"))
    found = read_lines(root, *lines, caption=None)
    assert [r.target.data for r in records(found)] == [*images, images[0], images[0]]
    assert found[-1].reason == Reason.BAD_RECORD
    assert len(found[-1].detail) < 200
    (edit,) = read_edits(root, {"input": [said[1], url], "target": said[2], "instruction": "mix"})
    assert ([i.data for i in edit.images], edit.target.data) == ([images[1], images[0]], images[2])


def test_with_an_answer_it_is_understanding(root: Path) -> None:
    lines = {"image": "1.jpg", "q": "What?", "a": "One."}, {"image": "1.jpg", "q": "What?"}
    found = read_lines(root, *lines, caption="q", answer="a")
    assert (found[0].task, found[0].prompt, found[0].answer) == (Task.UNDERSTANDING, "What?", "One.")
    assert ([p.data for p in found[0].images], found[0].target) == ([b"1.jpg"], None)
    assert reasons(found) == {"list.jsonl/2": Reason.BAD_RECORD}


@pytest.mark.parametrize("line", broken.BROKEN_LINES, ids=lambda line: line[:40].decode("ascii", "replace"))
def test_a_broken_line_is_left_out_alone(root: Path, line: bytes) -> None:
    fine = {"image": "1.jpg", "caption": "fine"}
    found = read_lines(root, fine, line, fine)
    assert [r.key for r in records(found)] == ["list.jsonl/1", "list.jsonl/3"]
    assert reasons(found) == {"list.jsonl/2": broken.BROKEN_LINES[line]}


def test_links_may_lead_about_but_not_out(root: Path) -> None:
    (root / "about.jpg").symlink_to(root / "a" / "3.jpg")
    (root / "up").symlink_to(root.parent)
    (root / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(root / "pipe.jpg")
    names = ["about.jpg", broken.link_out_of(root), "up/outside.jpg", "up/root/1.jpg", "loop.jpg", "pipe.jpg", "a"]
    found = read_lines(root, *({"image": name} for name in names), caption=None)
    assert [r.target.data for r in records(found)] == [b"a/3.jpg", b"1.jpg"]
    unsafe, missing = Reason.UNSAFE_PATH, Reason.NO_IMAGE
    assert list(reasons(found).values()) == [unsafe, unsafe, missing, missing, missing]


def test_absolute_paths_and_links_may_lead_where_the_config_allows(root: Path) -> None:
    beside = root.parent / "beside"
    beside.mkdir()
    (beside / "4.jpg").write_bytes(b"beside")
    (root / "4.jpg").symlink_to(beside / "4.jpg")
    (root / "5.jpg").symlink_to(root.parent / "outside.jpg")
    names = [root / "1.jpg", beside / "4.jpg", "4.jpg", "../beside/4.jpg", "5.jpg", root.parent / "outside.jpg"]
    lines = [{"image": str(name)} for name in names]
    strict, allowed = (read_lines(root, *lines, caption=None, also_below=also) for also in ((), (str(beside),)))
    assert [r.target.data for r in records(strict)] == [b"1.jpg"]
    assert [r.target.data for r in records(allowed)] == [b"1.jpg", b"beside", b"beside", b"beside"]
    assert set(reasons(strict).values()) == set(reasons(allowed).values()) == {Reason.UNSAFE_PATH}
    assert all("also_below" in r.detail for r in strict if isinstance(r, Rejection))
    assert len(records(read_lines(root, *lines, caption=None, root="/"))) == 3, "others lead nowhere from there"


def test_a_snapshot_of_the_hub_is_links_into_its_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "abc" / "data"
    blobs = tmp_path / "datasets--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "0123").write_bytes(b"image")
    (tmp_path / "outside.jpg").write_bytes(b"secret")
    for name, to in (("1.jpg", blobs / "0123"), ("2.jpg", tmp_path / "outside.jpg")):
        (snapshot / name).symlink_to(to)
    found = read_lines(snapshot, {"image": "1.jpg"}, {"image": "2.jpg"}, caption=None)
    assert [r.target.data for r in records(found)] == [b"image"]
    assert reasons(found) == {"list.jsonl/2": Reason.UNSAFE_PATH}


def test_a_field_that_no_row_has_is_refused_before_reading(root: Path) -> None:
    for options, message in (
        ({"caption": "text"}, "caption: .*no column text; it has image, caption.* null if there are none"),
        ({"image": "path"}, "image: .*no column path"),
        ({"answer": "a"}, "answer: .*no column a"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_lines(root, {"image": "1.jpg", "caption": "one"}, {"image": "2.jpg"}, **options)


def test_of_several_captions_the_key_decides(root: Path) -> None:
    lines = [{"image": "1.jpg", "caption": ["one", "", "two", "three"]}] * 40
    prompts = [r.prompt for r in read_lines(root, *lines, {"image": "2.jpg", "caption": ["", " "]})]
    assert set(prompts[:-1]) == {"one", "two", "three"}
    assert prompts[-1] is None
    assert [r.prompt for r in read_lines(root, *lines[:7])] == prompts[:7]


def test_a_conversation_is_a_question_and_its_answer(root: Path) -> None:
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "One."}]
    openai = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]
    lines = [said, [*openai, {"role": "assistant", "content": "One."}], said * 2, said[:1], [], "What?"]
    found = read_lines(root, *({"image": ["1.jpg"], "c": line} for line in lines), caption="c", answer="c")
    assert [(r.prompt, r.answer) for r in records(found)] == [("What?", "One.")] * 2 + [("What?", "What?")]
    assert list(reasons(found).values()) == [Reason.BAD_RECORD] * 3


def test_what_stands_in_logs_is_short(root: Path) -> None:
    (left_out,) = read_lines(root, {"image": "A" * 10**6, "caption": "one"})
    assert left_out.reason is Reason.NO_IMAGE
    assert len(left_out.detail) < 300
    assert left_out.detail.endswith("(1000000 characters)")


def test_a_root_may_itself_be_reached_by_a_link(root: Path) -> None:
    (root.parent / "link").symlink_to(root)
    line = {"image": "1.jpg", "caption": "one"}
    assert len(records(read_lines(root.parent / "link", line))) == 1
    assert len(records(read_lines(root, line, root=str(root.parent / "link")))) == 1


def test_images_start_at_the_root_or_beside_the_list(root: Path) -> None:
    found = read_lines(root, {"image": "3.jpg"}, root=str(root / "a"), caption=None)
    assert [r.target.data for r in found] == [b"a/3.jpg"]
    for directory in (root, root / "a"):
        broken.write_lines(directory / "list.jsonl", [{"image": "3.jpg"}, {"image": "1.jpg"}])
    found = read_all(folder(root / "**" / "list.jsonl", caption=None))
    assert [(r.key, r.target.data) for r in records(found)] == [
        ("a/list.jsonl/1", b"a/3.jpg"),
        ("list.jsonl/2", b"1.jpg"),
    ]


def test_it_works_on_any_filesystem() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/folder/in/1.jpg", b"one")
    memory.pipe("/outside.jpg", b"secret")
    lines = [{"image": name} for name in ("in/1.jpg", "in/2.jpg", "../outside.jpg")]
    memory.pipe("/folder/list.jsonl", b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    for options in ({}, {"root": "memory://folder"}):
        found = read_all(folder("memory://folder/*.jsonl", caption=None, **options))
        assert [r.target.data for r in records(found)] == [b"one"]
        assert list(reasons(found).values()) == [Reason.NO_IMAGE, Reason.UNSAFE_PATH]


@given(
    lines=st.lists(st.sampled_from([b'{"image": ""}', b"", b'{"image": "caf\xc3\xa9"}', b" " * 300]), max_size=30),
    size=st.integers(1, 12),
    newline=st.sampled_from([b"\n", b"\r\n"]),
    ended=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_parts_together_are_every_line_once(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], size: int, newline: bytes, ended: bool
) -> None:
    path = tmp_path_factory.mktemp("lines") / "list.jsonl"
    path.write_bytes(newline.join(lines) + (newline if ended and lines else b""))
    keys = [item.key for item in read_all(folder(path, caption=None), size)]
    assert keys == [f"list.jsonl/{n}" for n, line in enumerate(lines, 1) if line.strip()]


def test_a_byte_order_mark_is_no_damage(root: Path) -> None:
    found = read_lines(root, b'\xef\xbb\xbf{"image": "1.jpg", "caption": "\xef\xbb\xbfone"}', b"\xef\xbb\xbf")
    assert [r.prompt for r in found] == ["one"]


def test_a_changed_line_changes_its_part_alone(root: Path) -> None:
    def parts(*numbers: int) -> list[Any]:
        path = broken.write_lines(root / "list.jsonl", [{"image": f"{n}.jpg"} for n in numbers])
        return open_source(folder(path, caption=None)).parts(2)

    old, changed, longer = parts(1, 2, 3, 4), parts(1, 2, 3, 5), parts(1, 2, 3, 4, 5)
    assert [a == b for a, b in zip(old, changed, strict=True)] == [True, False]
    assert longer[:2] == old


@pytest.mark.parametrize(("path", "options"), [("none.jsonl", {}), ("a", {}), ("1.jpg", {"root": "1.jpg"})])
def test_nothing_to_read_is_a_config_error(root: Path, path: str, options: dict[str, str]) -> None:
    options = {field: str(root / value) for field, value in options.items()}
    with pytest.raises(ConfigError, match=r"source dir: (path|root): no .* at .*expected"):
        open_source(folder(root / path, **options)).parts(1)


@pytest.mark.parametrize(
    "content",
    [
        b'image,caption\n1.jpg,"two\nlines"\n',
        b'{\n "0": {"image": "1.jpg"}\n}\n',
        '{"image": "1.jpg"}\n'.encode("utf-16"),
        b'["1.jpg"]\n',
    ],
    ids=["csv", "pretty JSON", "UTF-16", "list of paths"],
)
def test_a_list_in_another_format_is_refused_before_reading(root: Path, content: bytes) -> None:
    (root / "list.csv").write_bytes(content)
    with pytest.raises(ConfigError, match=r"(?s)list\.csv is a JSON object.*expected JSONL in UTF-8.*read_csv"):
        open_source(folder(root / "list.csv")).parts(1)


def test_edits_have_one_input_or_several(root: Path) -> None:
    edit = {"instruction": "do", "target": "a/3.jpg"}
    inputs = ["1.jpg", ["1.jpg"], ["1.jpg", "2.jpg"], ["2.jpg", "1.jpg", "2.jpg"]]
    found = read_edits(root, *(edit | {"input": value} for value in inputs))
    assert [r.task for r in found] == [Task.EDIT, Task.EDIT, Task.MULTI_EDIT, Task.MULTI_EDIT]
    assert [[p.data.decode() for p in r.images] for r in found] == [["1.jpg"], *inputs[1:]]
    assert {(r.prompt, r.target.data) for r in found} == {("do", b"a/3.jpg")}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"input": []}, Reason.BAD_RECORD),
        ({"input": None}, Reason.BAD_RECORD),
        ({"input": [["1.jpg"]]}, Reason.BAD_RECORD),
        ({"input": {"file": "1.jpg"}}, Reason.BAD_RECORD),
        ({"target": None}, Reason.BAD_RECORD),
        ({"instruction": 3}, Reason.BAD_RECORD),
        ({"input": ["1.jpg", "nowhere.jpg"]}, Reason.NO_IMAGE),
        ({"target": "nowhere.jpg"}, Reason.NO_IMAGE),
        ({"input": ["1.jpg", "../outside.jpg"]}, Reason.UNSAFE_PATH),
        ({"target": "../outside.jpg"}, Reason.UNSAFE_PATH),
    ],
)
def test_a_broken_edit_is_left_out(root: Path, changes: dict[str, Any], reason: Reason) -> None:
    found = read_edits(root, {"instruction": "do", "input": "1.jpg", "target": "2.jpg"} | changes)
    assert reasons(found) == {"edits.jsonl/1": reason}


def test_an_edit_without_an_instruction_has_no_prompt(root: Path) -> None:
    edit = {"input": "1.jpg", "target": "2.jpg"}
    found = read_edits(root, edit | {"instruction": "do"}, edit, edit | {"instruction": []})
    assert [r.prompt for r in found] == ["do", None, None]
