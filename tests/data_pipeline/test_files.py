"""What a path names, and what is said where it names nothing."""

import gzip
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from zipfile import ZipFile

import pytest
from datasets import Dataset

from data_pipeline.records import WorkerError
from data_pipeline.sources import open_source
from data_pipeline.sources.files import Files
from tests.data_pipeline import broken
from tests.data_pipeline.reading import read_all, reasons, records
from tests.data_pipeline.worlds import curriculum_of, write_in_process
from wemmu.config import ConfigError
from wemmu.config.prepare import FolderSource


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three tars in a folder whose name has brackets."""
    folder = tmp_path / "set [v1]"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number:03d}.tar").write_bytes(b"x" * number)
    return folder


def names(url: str) -> list[str]:
    return [file.name for file in Files("web", url, "tar files", "*.tar").find()]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [("*.tar", 3), ("00[02].tar", 2), ("{000..002}.tar", 3), ("{000,002}.tar", 2), ("00{1..2}.tar", 2), ("001.tar", 1)],
)
def test_wildcards_and_braces(folder: Path, pattern: str, found: int) -> None:
    assert len(names(str(folder / pattern))) == found


def test_a_name_with_braces_may_be_meant_as_it_stands(folder: Path) -> None:
    (folder / "{0..1}.tar").write_bytes(b"x")
    assert names(str(folder / "{0..1}.tar")) == ["{0..1}.tar"]


def test_a_gap_in_braces_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file at .*/003.tar; expected tar files"):
        names(str(folder / "{000..004}.tar"))


def test_a_directory_is_no_file_and_the_files_in_it_are_shown(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"which is a directory; expected tar files in it, as .*/\*\.tar"):
        names(str(folder))


def test_pipes_and_devices_are_no_files_and_links_to_files_are(folder: Path) -> None:
    os.mkfifo(folder / "pipe.tar")
    (folder / "zero.tar").symlink_to("/dev/zero")
    (folder / "link.tar").symlink_to("002.tar")
    assert names(str(folder / "*.tar")) == ["000.tar", "001.tar", "002.tar", "link.tar"]
    for name in ("pipe.tar", "zero.tar"):
        with pytest.raises(ConfigError, match=f"{name} is a pipe or a device, not a file; expected tar files"):
            names(str(folder / name))


@pytest.fixture
def server() -> Iterator[str]:
    """Answers what the path says: /403/..."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(int(self.path.split("/")[1]))

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with served(Answer) as url:
        yield url


@contextmanager
def served(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_a_server_refuses_is_not_called_missing(server: str) -> None:
    for path in ("a.tar", "*.tar"):
        with pytest.raises(ConfigError, match=r"path: cannot list http.*403"):
            names(f"{server}/403/{path}")
    with pytest.raises(ConfigError, match="no file at"):
        names(f"{server}/404/a.tar")


def test_an_image_that_a_server_refuses_says_so(server: str, tmp_path: Path) -> None:
    broken.write_lines(tmp_path / "l.jsonl", [{"image": "1.jpg", "caption": "one"}])
    for code in (403, 404):
        source = open_source(FolderSource(kind="folder", name="dir", path=str(tmp_path / "l.jsonl")))
        source._root = lambda _, code=code: at(f"{server}/{code}")
        (part,) = source.parts(1)
        (left_out,) = source.read(part)
        assert left_out.reason == "image missing"
        assert (str(code) in left_out.detail) or code == 404


@pytest.mark.parametrize("archive", ["zip", "tar"])
def test_an_image_that_an_archive_lacks_or_has_damaged_is_left_out(tmp_path: Path, archive: str) -> None:
    broken.write_lines(tmp_path / "l.jsonl", [{"image": f"{name}.jpg", "caption": "a"} for name in ("a", "b", "c")])
    whole, cut = tmp_path / f"a.{archive}", tmp_path / f"b.{archive}"
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"images/{name}.jpg").write_bytes(name.encode() * 9)
    if archive == "zip":
        # Not compressed.
        with ZipFile(whole, "w") as opened:
            for file in (tmp_path / "images").iterdir():
                opened.write(file, f"images/{file.name}")
    else:
        shutil.make_archive(str(tmp_path / "a"), archive, tmp_path, "images")
    cut.write_bytes(whole.read_bytes().replace(b"b" * 9, b"c" * 9))

    def found(file: Path) -> list:
        url = f"{archive}://images::{file}"
        return read_all(FolderSource(kind="folder", name="dir", path=str(tmp_path / "l.jsonl"), root=url))

    assert list(reasons(found(whole)).items()) == [("l.jsonl/3", "image missing")]
    assert [record.target.data for record in records(found(whole))] == [b"a" * 9, b"b" * 9]
    if archive == "zip":
        assert list(reasons(found(cut)).values()) == ["image truncated", "image missing"]


@pytest.mark.parametrize("field", ["path", "root"])
@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("zip://x.zip", "Is a directory.*; a file in an archive is PROTOCOL://FILE::ARCHIVE"),
        ("zip://a::nowhere.zip", "No such file"),
        ("data:,a", "list index out of range"),
        # Nothing listens there.
        ("http://127.0.0.1:9/x", "127.0.0.1:9"),
    ],
)
def test_a_place_that_cannot_be_opened_is_told_with_its_field(tmp_path: Path, field: str, url: str, said: str) -> None:
    broken.write_lines(tmp_path / "l.jsonl", [{"image": "a.jpg", "caption": "a"}])
    places = {"path": str(tmp_path / "l.jsonl"), "root": str(tmp_path)} | {field: url}
    with pytest.raises(ConfigError, match=f"source dir: {field}: cannot .*{said}"):
        read_all(FolderSource(kind="folder", name="dir", **places))


def test_a_server_that_ends_while_it_is_read_is_told_with_the_part(tmp_path: Path) -> None:
    class Once(BaseHTTPRequestHandler):
        """Answers what is in the file, but closes the connection where an image is asked for."""

        def do_GET(self) -> None:
            if self.path == "/":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b'<a href="1.jpg">')
            self.close_connection = True

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    broken.write_lines(tmp_path / "l.jsonl", [{"image": "1.jpg", "caption": "one"}])
    with served(Once) as url:
        root = {"kind": "folder", "name": "dir", "path": str(tmp_path / "l.jsonl"), "root": f"{url}/"}
        with pytest.raises(WorkerError, match=r"dir/l.jsonl:1-1 cannot be read: .*; when its disk or server answers"):
            write_in_process(curriculum_of(tmp_path / "shards", [root], mixture={"t2i": 1}))


def at(url: str):
    from fsspec.core import url_to_fs

    from data_pipeline.sources.common import Root

    return Root(*url_to_fs(url))


def test_lists_that_are_no_lists_are_told_before_reading(tmp_path: Path) -> None:
    (tmp_path / "l.jsonl").write_bytes(broken.LFS_POINTER)
    config = FolderSource(kind="folder", name="dir", path=str(tmp_path / "l.jsonl"))
    assert list(reasons(read_all(config)).values()) == ["container broken"]
    (tmp_path / "l.jsonl").write_bytes(gzip.compress(b'{"image": "a"}\n'))
    with pytest.raises(ConfigError, match="compressed by gzip; unpack it"):
        read_all(config)
    Dataset.from_dict({"image": ["a"], "caption": ["a"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ConfigError, match="is an Arrow file, as of save_to_disk; write it as Parquet"):
        read_all(config.model_copy(update={"path": str(tmp_path / "saved/*.arrow")}))
