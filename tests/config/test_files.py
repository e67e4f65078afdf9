"""Files are whole or not there, and an error of the disk names its file."""

import errno
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from tools.export.replacing import aside
from wemmu.checkpoint.stream import write_safetensors
from wemmu.command_line import FAILED, FINAL, exit_code
from wemmu.config.files import replace_text, replacing
from wemmu.jsonlines import append_line
from wemmu.source import save_image

IMAGE = Image.effect_noise((64, 64), 90).convert("RGB")


@contextmanager
def small_files(most: int) -> Iterator[None]:
    """The system refuses to write beyond this many bytes of any file, as a full disk does: EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _sheet(file: Path) -> None:
    with replacing(file) as beside:
        IMAGE.save(beside, "PNG")


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("card.json", lambda file: replace_text(file, "x" * 1000)),
        ("image.png", lambda file: save_image(IMAGE, file, {"seed": 1})),
        ("image.jpg", lambda file: save_image(IMAGE, file, {})),
        ("image.webp", lambda file: save_image(IMAGE, file, {})),
        ("samples.png", _sheet),
    ],
)
def test_a_disk_that_is_full_leaves_the_old_file_whole_and_is_named(
    name: str, write: Callable[[Path], None], tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(b"old")
    with small_files(100), pytest.raises(OSError) as caught:
        write(file)
    assert (caught.value.filename, exit_code(caught.value)) == (str(file), FINAL)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
    write(file)
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() != b"old"


def test_two_processes_may_write_a_file_at_once(tmp_path: Path) -> None:
    file, code = tmp_path / "card.json", "import sys, wemmu.config.files as f; f.replace_text(f.Path(sys.argv[1]), 'b')"
    with replacing(file) as aside:
        aside.write_text("a")
        subprocess.run([sys.executable, "-c", code, file], check=True)
        assert file.read_text() == "b"
    assert file.read_text() == "a"
    assert list(tmp_path.iterdir()) == [file]


def test_lines_and_tensors_that_do_not_fit_name_their_file(tmp_path: Path) -> None:
    lines, weights = tmp_path / "metrics.jsonl", tmp_path / "model.safetensors"
    with small_files(100):
        with pytest.raises(OSError, match=lines.name):
            append_line(lines, {"text": "x" * 1000})
        with pytest.raises(OSError, match=weights.name):
            write_safetensors(weights, {"w": (torch.float32, [1000])}, lambda _: torch.zeros(1000))


def test_a_library_that_hides_the_number_of_a_full_disk_is_understood(tmp_path: Path) -> None:
    """Tokenizers and safetensors, which are Rust, raise their own exceptions; an export leaves the earlier one."""
    out = tmp_path / "export"
    for words in ("No space left on device (os error 28)", "IoError(Os { code: 28, kind: StorageFull })"):
        with pytest.raises(OSError) as caught, aside(out):
            raise RuntimeError(words)
        assert (caught.value.errno, str(out.parent) in str(caught.value)) == (errno.ENOSPC, True)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fails_is_no_bug_and_may_be_tried_again() -> None:
    assert exit_code(OSError(errno.EIO, "Input/output error")) == FAILED
