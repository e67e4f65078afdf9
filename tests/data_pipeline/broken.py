"""Records as they come from the wild: odd but fine ones, damaged ones, hostile ones; all made on the spot."""

import gzip
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms
from skimage import data

from data_pipeline.records import Reason

ORIENTATION = 0x0112


@cache
def photograph(name: str = "astronaut") -> Image.Image:
    """A photograph that the wheel of scikit-image carries: astronaut (512 x 512 px), coffee (600 x 400), ..."""
    return Image.fromarray(getattr(data, name)())


def encode(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


# Images, odd but fine.


def png_named_jpg() -> bytes:
    return encode(photograph("chelsea"), "PNG")


def cmyk_jpeg() -> bytes:
    """In four channels, inverted as Adobe writes it."""
    return encode(photograph("chelsea").convert("CMYK"), quality=95)


def sixteen_bit_png() -> bytes:
    """Grey from black to white in 256 steps of 257."""
    return encode(Image.fromarray(np.tile(np.arange(256, dtype=np.uint16) * 257, (8, 1))), "PNG")


def palette_with_alpha_png() -> bytes:
    """2 x 1 px: opaque red, and a blue that the palette declares transparent."""
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    return encode(image, "PNG", transparency=bytes([255, 0]))


def rotated_jpeg(orientation: int = 6) -> bytes:
    return encode(photograph("coffee"), exif=_exif(orientation))


def swapped_profile() -> bytes:
    """An ICC profile of sRGB in which red and blue have changed places."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"tmp_", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"tmp_", b"bXYZ", 1)


def linear_profile() -> bytes:
    """An ICC profile of sRGB's colours without its curve: half of the light is level 128."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # The exponent 2.4 of the parametric curve, as a fixed-point number; and its linear beginning, which ends at 0.
    curve = struct.pack(">5i", *(round(x * 65536) for x in (1, 1, 0, 1, 0)))
    start = profile.index(b"para") + 12
    return profile[:start] + curve + profile[start + 20 :]


def grey_profile() -> bytes:
    """An ICC profile of grey whose levels are shares of the light: a header of 128 bytes, a white point, a curve."""
    d50 = struct.pack(">3i", *(round(x * 65536) for x in (0.9642, 1, 0.8249)))
    tags = {b"wtpt": b"XYZ \0\0\0\0" + d50, b"kTRC": b"curv" + bytes(8)}
    start = 128 + 4 + 12 * len(tags)
    table, content = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += name + struct.pack(">II", start + len(content), len(value))
        content += value
    kind = b"\2\x40\0\0" + b"mntrGRAYXYZ " + struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp"
    header = struct.pack(">I4x", start + len(content)) + kind + bytes(28) + d50
    return header.ljust(128, b"\0") + table + content


def animated_gif() -> bytes:
    """A red frame and a blue one."""
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    return encode(red, "GIF", save_all=True, append_images=[blue])


# Images that are none.


def truncated_jpeg() -> bytes:
    whole = encode(photograph())
    return whole[: len(whole) // 2]


def text_named_jpg() -> bytes:
    return b"<html><body>404 Not Found</body></html>"


def damaged_png() -> bytes:
    """With one bit of its pixels flipped, which its checksum betrays."""
    whole = bytearray(encode(photograph("chelsea"), "PNG"))
    whole[len(whole) // 2] ^= 1
    return bytes(whole)


def bomb_png(side: int = 20_000) -> bytes:
    """side x side px of black in a file of some 50 kB."""
    rows = zlib.compress(bytes((side // 8 + 1) * side), 9)
    return b"\x89PNG\r\n\x1a\n" + _header(side) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def header_of_png(side: int) -> bytes:
    """A PNG that ends before its pixels: what is known of it is known from the header."""
    return b"\x89PNG\r\n\x1a\n" + _header(side) + struct.pack(">I", 1000) + b"IDAT"


def _header(side: int) -> bytes:
    return _chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


FINE_IMAGES = {
    "png named jpg": png_named_jpg,
    "cmyk jpeg": cmyk_jpeg,
    "16-bit png": sixteen_bit_png,
    "palette with alpha": palette_with_alpha_png,
    "rotated by exif": rotated_jpeg,
    "animation": animated_gif,
}

BROKEN_IMAGES = {
    "no bytes": (bytes, Reason.EMPTY_IMAGE),
    "text named jpg": (text_named_jpg, Reason.NOT_AN_IMAGE),
    "truncated jpeg": (truncated_jpeg, Reason.TRUNCATED),
    "damaged png": (damaged_png, Reason.TRUNCATED),
    "decompression bomb": (bomb_png, Reason.TOO_MANY_PIXELS),
}

# Texts and lines.

BROKEN_TEXT = b"caf\xe9"
BROKEN_LINES = {
    b'{"image": "1.jpg", "caption": "cut of': Reason.BAD_RECORD,
    b'["1.jpg", "a list"]': Reason.BAD_RECORD,
    b'{"image": "1.jpg", "caption": 7}': Reason.BAD_RECORD,
    b'{"caption": "no image field"}': Reason.BAD_RECORD,
    b"[" * 100_000: Reason.BAD_RECORD,
    b'{"image": "1.jpg", "caption": "' + BROKEN_TEXT + b'"}': Reason.BAD_TEXT,
    b'{"image": "1.jpg", "caption": "half a \\ud83d pair"}': Reason.BAD_TEXT,
    b'{"image": "\\ud83d.jpg", "caption": "half a pair"}': Reason.BAD_TEXT,
    b'{"image": "nowhere.jpg", "caption": "lost"}': Reason.NO_IMAGE,
    b'{"image": "' + b"x" * 300 + b'.jpg", "caption": "a name that no file can have"}': Reason.NO_IMAGE,
    b'{"image": "../outside.jpg", "caption": "escape"}': Reason.UNSAFE_PATH,
    b'{"image": "a/../../outside.jpg", "caption": "escape"}': Reason.UNSAFE_PATH,
    b'{"image": "/etc/hostname", "caption": "escape"}': Reason.UNSAFE_PATH,
    b'{"image": "1.jpg\\u0000", "caption": "escape"}': Reason.UNSAFE_PATH,
}


def write_lines(path: Path, lines: Iterable[bytes | dict[str, Any]]) -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def link_out_of(root: Path, name: str = "link.jpg") -> str:
    """A symbolic link in `root` to an image beside it; returns its name."""
    (root.parent / "outside.jpg").write_bytes(encode(photograph("chelsea")))
    (root / name).symlink_to(root.parent / "outside.jpg")
    return name


# What git leaves in the place of a file that it did not fetch.
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 1048576\n" % 0

# Tars.


def tar(members: Iterable[tuple[str, bytes] | tarfile.TarInfo], compress: bool = False) -> bytes:
    """A tar of files (name, content) and of members without content."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                name, content = member
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return gzip.compress(out.getvalue(), mtime=0) if compress else out.getvalue()


def pairs(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    """Members of `count` records as img2dataset names them: small images and their captions."""
    image = encode(photograph().resize((32, 32)))
    numbers = range(first, first + count)
    return [m for n in numbers for m in ((f"{n:06d}.jpg", image + bytes([n])), (f"{n:06d}.txt", b"number %d" % n))]


def link(name: str, to: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info
