"""Tars as img2dataset writes them, and tars as they must not be."""

import gzip
import tarfile
from pathlib import Path

import fsspec
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.records import RawRecord, Reason, Rejection
from data_pipeline.sources import open_source
from data_pipeline.sources.webdataset import IMAGES
from tests.data_pipeline import broken
from tests.data_pipeline.reading import read_all, reasons, records
from wemmu.config import ConfigError, Task
from wemmu.config.prepare import WebDatasetSource
from wemmu.images import FORMATS


def source(path: Path | str, **options: object) -> WebDatasetSource:
    return WebDatasetSource(kind="webdataset", name="web", path=str(path), **options)


def read_tar(root: Path, content: bytes, **options: object) -> list[RawRecord | Rejection]:
    (root / "0.tar").write_bytes(content)
    return read_all(source(root / "0.tar", **options))


def test_every_format_that_can_be_decoded_is_an_image(tmp_path: Path) -> None:
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    common = {f".{suffix}" for suffix in IMAGES}
    assert common <= suffixes
    assert {Image.registered_extensions()[suffix] for suffix in common} == set(FORMATS)
    found = read_tar(tmp_path, broken.tar([("a.AVIF", b"x"), ("a.txt", b"a"), ("b.tif", b"y"), ("b.txt", b"b")]))
    assert [record.target.data for record in found] == [b"x", b"y"]


def test_a_record_is_an_image_and_its_caption(tmp_path: Path) -> None:
    found = read_tar(tmp_path, broken.tar(broken.pairs(3)))
    assert [(r.key, r.prompt, r.task) for r in found] == [(f"0.tar/{n:06d}", f"number {n}", Task.T2I) for n in range(3)]
    assert [(r.images, r.target.data) for r in found] == [((), data) for _, data in broken.pairs(3)[::2]]


@pytest.mark.parametrize("compress", [False, True])
def test_the_same_records_as_webdataset_reads(tmp_path: Path, compress: bool) -> None:
    members = [("a/1.jpg", b"one"), ("a/1.txt", b"first"), ("a/1.cls", b"0"), ("a/2.b.png", b"no"), ("a/2.PNG", b"two")]
    path = tmp_path / ("0.tar.gz" if compress else "0.tar")
    path.write_bytes(broken.tar([*members, ("a/2.txt", b"second"), ("._1.jpg", b"mac")], compress))
    theirs = [
        (sample["__key__"], sample.get("jpg") or sample.get("png"), sample["txt"])
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
    ]
    ours = [(r.key.removeprefix(f"{path.name}/"), r.target.data, r.prompt.encode()) for r in read_all(source(path))]
    assert ours == theirs == [("a/1", b"one", b"first"), ("a/2", b"two", b"second")]


@pytest.mark.parametrize("url", ["{root}/*.tar", "memory://web-tars/*.tar"])
def test_every_tar_is_a_part_on_any_filesystem(tmp_path: Path, url: str) -> None:
    url = url.format(root=tmp_path)
    for number in range(3):
        with fsspec.open(url.replace("*", f"{number:05d}"), "wb") as file:
            file.write(broken.tar(broken.pairs(2, first=2 * number)))
    found = read_all(source(url))
    assert [r.key for r in found] == [f"{n // 2:05d}.tar/{n:06d}" for n in range(6)]
    assert [part.name for part in open_source(source(url)).parts(1)] == ["00000.tar", "00001.tar", "00002.tar"]


def test_equal_file_names_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for folder in ("a", "b/c"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "0.tar").write_bytes(broken.tar(broken.pairs(1)))
    assert [r.key for r in read_all(source(tmp_path / "**/*.tar"))] == ["a/0.tar/000000", "b/c/0.tar/000000"]


def test_a_changed_tar_is_another_part(tmp_path: Path) -> None:
    parts = []
    for count in (1, 5):
        (tmp_path / "0.tar").write_bytes(broken.tar(broken.pairs(count)))
        parts += open_source(source(tmp_path / "0.tar")).parts(1)
    assert parts[0] != parts[1]


@pytest.mark.parametrize("path", ["nothing.tar", "*.tar", "."])
def test_nothing_to_read_is_a_config_error(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigError, match=r"web: path: .*expected tar files"):
        open_source(source(tmp_path / path)).parts(1)


def test_an_unknown_protocol_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="web: path: cannot open"):
        open_source(source("gopher://a/*.tar"))


@pytest.mark.parametrize(
    ("members", "prompt"),
    [
        ([("txt", b"text\n"), ("json", b'{"caption": "json"}')], "text"),
        ([("json", b'{"caption": "json"}')], "json"),
        ([("json", b'{"caption": ""}')], ""),
        ([("txt", b"")], ""),
        ([("txt", b"\n"), ("json", b'{"caption": "json"}')], "json"),
        ([("txt", b"\xef\xbb\xbfwindows\r\n")], "windows"),
        ([("json", b'{"caption": null}')], None),
        ([("json", b"{}")], None),
        ([], None),
    ],
)
def test_the_first_caption_that_is_there_counts(
    tmp_path: Path, members: list[tuple[str, bytes]], prompt: str | None
) -> None:
    own = [("1.jpg", b"x"), *((f"1.{kind}", data) for kind, data in members)]
    found = read_tar(tmp_path, broken.tar([*broken.pairs(1), *own]))
    assert [r.prompt for r in found] == ["number 0", prompt]


def test_captions_stand_where_the_config_says(tmp_path: Path) -> None:
    members = [("1.jpg", b"x"), ("1.alt", b"alt"), ("1.json", b'{"long: text": "json"}')]
    for places, prompt in ((("alt",), "alt"), (("json:long: text",), "json"), ((), None)):
        assert read_tar(tmp_path, broken.tar(members), caption=places)[0].prompt == prompt
    for place in ("txt", "json:caption"):
        with pytest.raises(ConfigError, match=rf"caption: none of .* has {place}; their members are jpg, .*alt"):
            read_tar(tmp_path, broken.tar(members), caption=(place,))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ([("bad.txt", b"no image")], Reason.NO_IMAGE),
        ([("bad.jpg", b"x"), ("bad.txt", broken.BROKEN_TEXT)], Reason.BAD_TEXT),
        ([("bad.jpg", b"x"), ("bad.json", b'{"caption": "cut')], Reason.BAD_RECORD),
        ([("bad.jpg", b"x"), ("bad.json", b'{"caption": [7]}')], Reason.BAD_RECORD),
        ([("bad.jpg", b"x"), ("bad.json", b'{"caption": "' + broken.BROKEN_TEXT + b'"}')], Reason.BAD_TEXT),
        ([("bad.jpg", b"x"), ("bad.png", b"y"), ("bad.txt", b"which?")], Reason.BAD_RECORD),
        ([("bad.jpg", b"x"), ("bad.jpg", b"y"), ("bad.txt", b"which?")], Reason.BAD_RECORD),
        ([("../bad.jpg", b"x"), ("../bad.txt", b"escape")], Reason.UNSAFE_PATH),
        ([("a/../../bad.jpg", b"x")], Reason.UNSAFE_PATH),
        ([("/etc/bad.jpg", b"x")], Reason.UNSAFE_PATH),
        ([("../../bad", b"x")], Reason.UNSAFE_PATH),
        ([broken.link("bad.jpg", "/etc/hostname"), ("bad.txt", b"link")], Reason.UNSAFE_PATH),
        ([broken.link("bad.jpg", "000000.jpg", tarfile.LNKTYPE), ("bad.txt", b"link")], Reason.UNSAFE_PATH),
        ([broken.link("bad", "", tarfile.CHRTYPE)], Reason.UNSAFE_PATH),
        ([broken.link("bad.jpg", "", tarfile.FIFOTYPE)], Reason.UNSAFE_PATH),
    ],
)
def test_a_bad_record_is_left_out_alone(tmp_path: Path, bad: list, reason: Reason) -> None:
    found = read_tar(tmp_path, broken.tar([*broken.pairs(1), *bad, *broken.pairs(1, first=1)]))
    assert [r.prompt for r in records(found)] == ["number 0", "number 1"]
    left_out = reasons(found)
    assert list(left_out.values()) == [reason]
    assert next(iter(left_out)).endswith("bad")
    assert [path.name for path in tmp_path.iterdir()] == ["0.tar"]


def test_a_key_counts_once(tmp_path: Path) -> None:
    found = read_tar(tmp_path, broken.tar([*broken.pairs(2), *broken.pairs(1)]))
    assert [r.prompt for r in records(found)] == ["number 0", "number 1"]
    assert reasons(found) == {"0.tar/000000": Reason.BAD_RECORD}


def shuffled(pairs: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """All images, then all captions, the last first."""
    return [*pairs[::2], *pairs[1::2][::-1]]


def test_members_far_apart_are_one_record_all_the_same(tmp_path: Path) -> None:
    found = read_tar(tmp_path, broken.tar(shuffled(broken.pairs(3))))
    assert sorted((r.key, r.prompt) for r in found) == [(f"0.tar/{n:06d}", f"number {n}") for n in range(3)]


def test_members_too_far_apart_lose_the_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of its captions is taken for missing without a word."""
    monkeypatch.setattr("data_pipeline.sources.webdataset._WAITING", 3000)
    found = read_tar(tmp_path, broken.tar([*broken.pairs(1), *shuffled(broken.pairs(9, first=1))]))
    assert reasons(found) == {"": Reason.BAD_CONTAINER}
    assert "sort the tar" in found[-1].detail


def test_names_that_merge_are_each_a_damaged_record(tmp_path: Path) -> None:
    members = [(f"scene.{name}", data) for name, data in broken.pairs(5)]
    found = read_tar(tmp_path, broken.tar([*broken.pairs(2), *members]))
    assert [r.prompt for r in records(found)] == ["number 0", "number 1"]
    assert reasons(found) == {f"0.tar/scene.{n:06d}.jpg": Reason.MERGED for n in range(5)}
    # A second image of a record that has its own is what it always was: not wanted.
    found = read_tar(tmp_path, broken.tar([*broken.pairs(1), ("000000.mask.png", b"x"), ("000000.depth.png", b"x")]))
    assert [r.prompt for r in found] == ["number 0"]


def test_a_pointer_of_git_lfs_is_known_before_reading(tmp_path: Path) -> None:
    found = read_tar(tmp_path, broken.LFS_POINTER)
    assert reasons(found) == {"": Reason.BAD_CONTAINER}
    (part,) = open_source(source(tmp_path / "0.tar")).parts(1)
    assert "git lfs pull" in part.place["broken"]


def test_folders_and_files_without_a_kind_are_no_records(tmp_path: Path) -> None:
    folder = tarfile.TarInfo("./")
    folder.type = tarfile.DIRTYPE
    members = [folder, ("./LICENSE", b"text"), ("./.hidden.jpg", b"x"), ("./1.jpg", b"x"), ("./1.txt", b"one")]
    assert [r.key for r in read_tar(tmp_path, broken.tar(members))] == ["0.tar/1"]


def test_names_that_are_not_utf8_become_keys_all_the_same(tmp_path: Path) -> None:
    content = broken.tar([("cafX.jpg", b"x"), ("cafX.txt", b"name")])
    for name in (b"caf%s.jpg", b"caf%s.txt"):
        header = content.index(name % b"X")
        old = content[header : header + 512]
        new = old.replace(b"X", b"\xe9", 1)
        checksum = b"%06o\0 " % (int(old[148:154], 8) + 0xE9 - ord("X"))
        content = content.replace(old, new[:148] + checksum + new[156:])
    assert [(r.key, r.prompt) for r in read_tar(tmp_path, content)] == [("0.tar/caf\\xe9", "name")]


def test_a_huge_claim_is_not_believed(tmp_path: Path) -> None:
    # GNU's sparse files have a size of their own, and no content.
    header = bytearray(tarfile.TarInfo("bad.jpg").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b"S"
    header[483:495] = b"%011o\0" % 2**32
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    assert reasons(read_tar(tmp_path, bytes(header) + broken.tar(broken.pairs(1)))) == {"0.tar/bad": Reason.BAD_RECORD}


@given(cut=st.integers(0, 10_000), compress=st.booleans())
@settings(max_examples=80, deadline=None)
def test_a_tar_gives_what_stands_before_its_end_and_says_that_it_broke(
    tmp_path_factory: pytest.TempPathFactory, cut: int, compress: bool
) -> None:
    members = broken.pairs(6)
    whole = broken.tar(members, compress)
    # Behind the records there are only zeros: two blocks end the tar, more fill it up.
    end = len(whole) if compress else sum(512 + (len(data) + 511) // 512 * 512 for _, data in members) + 512
    found = read_tar(tmp_path_factory.mktemp("cut"), whole[: cut % end])
    assert [r.prompt for r in records(found)] == [f"number {n}" for n in range(len(records(found)))]
    assert all(r.target.data == members[2 * n][1] for n, r in enumerate(records(found)))
    assert list(reasons(found).values()) == [Reason.BAD_CONTAINER]
    assert isinstance(found[-1], Rejection)


def test_a_cut_tar_gives_every_record_that_another_follows(tmp_path: Path) -> None:
    whole = broken.tar(broken.pairs(6))
    cut = whole.index(b"000004.jpg") + 600
    assert [r.prompt for r in records(read_tar(tmp_path, whole[:cut]))] == [f"number {n}" for n in range(4)]


def test_damage_in_the_middle_is_not_taken_for_the_end(tmp_path: Path) -> None:
    whole = broken.tar(broken.pairs(4))
    header = whole.index(b"000002.jpg")
    for damage in (b"\xff" * 512, bytes(512)):
        found = read_tar(tmp_path, whole[:header] + damage + whole[header + 512 :])
        assert [r.prompt for r in records(found)][:1] == ["number 0"]
        assert Reason.BAD_CONTAINER in reasons(found).values()


def test_tars_joined_by_cat_are_not_cut_silently(tmp_path: Path) -> None:
    found = read_tar(tmp_path, broken.tar(broken.pairs(2)) + broken.tar(broken.pairs(2, first=2)))
    assert Reason.BAD_CONTAINER in reasons(found).values()


def test_a_damaged_gzip_is_noticed(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(broken.tar(broken.pairs(4)), compresslevel=0, mtime=0))
    content[len(content) // 2] ^= 1
    assert Reason.BAD_CONTAINER in reasons(read_tar(tmp_path, bytes(content))).values()


@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=20))
@settings(max_examples=200, deadline=None)
def test_damaged_bytes_raise_nothing(tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]) -> None:
    content = bytearray(broken.tar([(("x" * 120) + name, data) for name, data in broken.pairs(3)]))
    for position, change in flips:
        content[position % len(content)] ^= change
    folder = tmp_path_factory.mktemp("flipped")
    # Captions are looked for in the first tar, and damage can change the names of members.
    (folder / "-.tar").write_bytes(broken.tar(broken.pairs(1)))
    (folder / "0.tar").write_bytes(bytes(content))
    read_all(source(folder / "*.tar"))
