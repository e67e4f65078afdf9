"""From files to RGB: the right colours, upright, and a named reason for everything that is no image."""

import struct
import zlib
from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, ImageOps

from data_pipeline.images import decode
from data_pipeline.records import EncodedImage, Reason, RejectedError
from tests.data_pipeline import broken
from wemmu.images import fit, scale_to_cover, to_rgb

LIMIT = 10**8


def pixels(data: bytes, limit: int = LIMIT) -> np.ndarray:
    """[H, W, 3]"""
    image = decode(EncodedImage("a.jpg", data), limit)
    assert image.mode == "RGB"
    return np.asarray(image)


def reason(data: bytes, limit: int = LIMIT) -> Reason | None:
    try:
        pixels(data, limit)
    except RejectedError as error:
        return error.reason
    return None


def test_messages_are_the_same_in_every_run() -> None:
    for make, _ in broken.BROKEN_IMAGES.values():
        with pytest.raises(RejectedError) as caught:
            pixels(make())
        assert "object at 0x" not in caught.value.detail


def shades(*values: int) -> np.ndarray:
    """One row of grey pixels."""
    return np.repeat(np.array(values)[None, :, None], 3, axis=2)


@pytest.mark.parametrize("name", broken.FINE_IMAGES)
def test_odd_images_are_read(name: str) -> None:
    assert reason(broken.FINE_IMAGES[name]()) is None


@pytest.mark.parametrize("name", broken.BROKEN_IMAGES)
def test_broken_images_have_their_reason(name: str) -> None:
    make, expected = broken.BROKEN_IMAGES[name]
    assert reason(make()) is expected


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_files_come_back_exactly(format: str) -> None:
    photograph = broken.photograph("chelsea")
    options = {"lossless": True} if format == "WEBP" else {}
    assert np.array_equal(pixels(broken.encode(photograph, format, **options)), np.asarray(photograph))


@pytest.mark.parametrize("format", ["PCX", "PPM", "ICO", "TGA"])
def test_other_formats_are_not_images(format: str) -> None:
    assert reason(broken.encode(broken.photograph("chelsea"), format)) is Reason.NOT_AN_IMAGE


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@given(share=st.floats(0, 1, exclude_max=True), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_file_that_ends_early_is_never_taken_for_whole(format: str, share: float, data: st.DataObject) -> None:
    whole = broken.encode(broken.photograph("chelsea").resize((64, 48)), format)
    cut = whole[: int(share * len(whole))]
    if reason(cut) is None:
        # Only what stands behind the pixels is lost.
        assert np.array_equal(pixels(cut), pixels(whole))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=6))
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_raise_nothing_but_a_rejection(format: str, flips: list[tuple[int, int]]) -> None:
    photograph = broken.photograph("chelsea").resize((24, 16))
    exif = Image.Exif()
    exif[broken.ORIENTATION] = 6
    options = {} if format in ("GIF", "BMP") else {"icc_profile": broken.swapped_profile(), "exif": exif}
    data = bytearray(broken.encode(photograph, format, **options))
    for position, change in flips:
        # The headers, where damage does most, are at the beginning of most formats and at the end of TIFF.
        data[position % min(len(data), 700) * (-1 if format == "TIFF" else 1)] ^= change
    reason(bytes(data), limit=10**6)


def test_the_limit_counts_pixels_and_needs_only_the_header() -> None:
    fine = broken.encode(Image.new("RGB", (30, 20)), "PNG")
    assert (reason(fine, 600), reason(fine, 599)) == (None, Reason.TOO_MANY_PIXELS)
    assert reason(broken.header_of_png(100), 9_999) is Reason.TOO_MANY_PIXELS
    assert reason(broken.header_of_png(100), 10_000) is Reason.TRUNCATED


def test_a_bomb_is_refused_even_without_a_limit() -> None:
    assert len(broken.bomb_png()) < 100_000
    assert reason(broken.bomb_png(), 10**12) is Reason.TOO_MANY_PIXELS


@pytest.mark.filterwarnings("error")
def test_between_pillows_two_bounds_the_limit_alone_decides() -> None:
    assert reason(broken.header_of_png(10_001), 10**8) is Reason.TOO_MANY_PIXELS
    assert reason(broken.header_of_png(10_001), 2 * 10**8) is Reason.TRUNCATED


# Stored array -> what is seen, by the tag's definition: at 6, row 0 is the right side and column 0 the top.
SEEN: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", SEEN)
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_images_are_upright(format: str, orientation: int) -> None:
    photograph = broken.photograph("coffee").resize((60, 40))
    exif = Image.Exif()
    exif[broken.ORIENTATION] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    seen = pixels(broken.encode(photograph, format, exif=exif, **options))
    assert np.array_equal(seen, SEEN[orientation](np.asarray(photograph)))


def test_exif_that_cannot_be_read_leaves_the_image_as_it_is() -> None:
    photograph = broken.photograph("chelsea")
    assert reason(broken.encode(photograph, "JPEG", exif=b"Exif\0\0MM\0*\0\0")) is None
    assert pixels(broken.rotated_jpeg(6)).shape == (600, 400, 3)


def test_cmyk_has_the_colours_of_its_rgb() -> None:
    difference = pixels(broken.cmyk_jpeg()).astype(int) - np.asarray(broken.photograph("chelsea"))
    assert np.abs(difference).mean() < 3


def test_deep_grey_is_scaled_not_clipped() -> None:
    assert np.array_equal(pixels(broken.sixteen_bit_png())[0], shades(*range(256))[0])
    big_endian = np.array([[0, 128, 129, 25700, 65535]], dtype=">u2")
    assert np.array_equal(pixels(broken.encode(Image.fromarray(big_endian), "TIFF")), shades(0, 0, 1, 100, 255))


@pytest.mark.parametrize(
    ("levels", "dtype", "expected"),
    [
        ([-5, 0, 25700, 65535, 10**6], np.int32, [0, 0, 100, 255, 255]),
        ([0, 100, 255], np.int32, [0, 100, 255]),
        ([0, 10**8, 2 * 10**9], np.int32, [0, 13, 255]),
        ([-1, 0, 0.2, 1, 7, np.nan, np.inf], np.float32, [0, 0, 51, 255, 255, 0, 255]),
        ([0, 100, 255], np.float32, [0, 100, 255]),
        ([0, 25700, 65535], np.float32, [0, 100, 255]),
    ],
)
def test_floats_and_wide_integers_find_their_white(levels: list[float], dtype: type, expected: list[int]) -> None:
    """By the levels in use, of which a few may be beyond it: neither all white nor all black."""
    usual = [max(level for level, shade in zip(levels, expected, strict=True) if shade == 255 and level < 7e9)]
    usual = [1.0] if dtype is np.float32 and 1 in levels else [65535] if 65535 in levels else usual
    file = broken.encode(Image.fromarray(np.array([levels + usual * 300], dtype=dtype)), "TIFF")
    assert np.array_equal(pixels(file)[:, : len(levels)], shades(*expected))


def test_floats_without_a_finite_level_are_refused() -> None:
    file = broken.encode(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF")
    with pytest.raises(RejectedError, match="no finite level"):
        decode(EncodedImage("a.tiff", file), 100)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_open_image_becomes_what_its_file_becomes(orientation: int) -> None:
    """Inference takes images that somebody opened, training takes files: both see the same pixels."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    for make in (lambda i: i, lambda i: i.convert("RGBA"), lambda i: i.convert("LA"), lambda i: i.convert("P")):
        image = make(broken.photograph("chelsea").resize((40, 30)))
        if image.mode in ("RGBA", "LA"):
            image.putalpha(Image.linear_gradient("L").resize(image.size))
        file = broken.encode(image, "PNG", exif=exif)
        assert np.array_equal(np.asarray(to_rgb(Image.open(BytesIO(file)))), pixels(file))


def test_avif_is_read() -> None:
    file = broken.encode(broken.photograph("chelsea"), "AVIF", quality=95)
    difference = pixels(file).astype(int) - np.asarray(broken.photograph("chelsea"))
    assert np.abs(difference).mean() < 4


def test_transparent_becomes_white() -> None:
    assert pixels(broken.palette_with_alpha_png()).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    half = Image.new("RGBA", (1, 1), (255, 0, 0, 127))
    assert pixels(broken.encode(half, "PNG")).tolist() == [[[255, 128, 128]]]
    assert np.array_equal(pixels(broken.encode(Image.new("LA", (1, 1), (0, 51)), "PNG")), shades(204))
    keyed = Image.fromarray(np.array([[10, 20]], dtype=np.uint8))
    assert np.array_equal(pixels(broken.encode(keyed, "PNG", transparency=20)), shades(10, 255))


def keyed_png(bits: int, colours: int, row: bytes, key: tuple[int, ...]) -> bytes:
    """2 x 1 px in a colour type of the PNG standard (0: grey, 2: RGB), with the transparent level or colour in tRNS."""
    size = struct.pack(">IIBBBBB", 2, 1, bits, colours, 0, 0, 0)
    chunks = (b"IHDR", size), (b"tRNS", struct.pack(f">{len(key)}H", *key)), (b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (*chunks, (b"IEND", b""))
    )


@pytest.mark.parametrize(
    ("bits", "colours", "row", "key"),
    [
        (1, 0, bytes([0b10000000]), (1,)),
        (2, 0, bytes([0b01000000]), (1,)),
        (4, 0, bytes([0x10]), (1,)),
        (8, 0, bytes([0x10, 0]), (0x10,)),
        (16, 0, struct.pack(">2H", 0x1234, 0), (0x1234,)),
        (8, 2, bytes([1, 2, 3, 0, 0, 0]), (1, 2, 3)),
        (16, 2, struct.pack(">6H", 0x1234, 0x2345, 0x3456, 0, 0, 0), (0x1234, 0x2345, 0x3456)),
        # Its high bytes are those of an 8-bit colour.
        (16, 2, struct.pack(">6H", 0x12, 0x1200, 0xFF, 0, 0, 0), (0x12, 0x1200, 0xFF)),
    ],
)
def test_the_transparent_level_or_colour_of_a_png_becomes_white_at_any_depth(
    bits: int, colours: int, row: bytes, key: tuple[int, ...]
) -> None:
    data = keyed_png(bits, colours, row, key)
    assert pixels(data).tolist() == [[[255] * 3, [0] * 3]]
    assert np.array_equal(np.asarray(to_rgb(Image.open(BytesIO(data)))), pixels(data))


def test_only_the_very_level_of_deep_grey_is_transparent() -> None:
    assert np.array_equal(pixels(keyed_png(16, 0, struct.pack(">2H", 0x1234, 0x1235), (0x1234,))), shades(255, 0x12))


@pytest.mark.parametrize("kind", [1, 2], ids=["premultiplied", "unassociated"])
def test_grey_tiffs_with_alpha_are_read(kind: int) -> None:
    level, alpha = 100, 51
    stored = np.array([[[level * alpha // 255 if kind == 1 else level, alpha]]], dtype=np.uint8)
    # Pillow always writes the tag ExtraSamples (338) as 2, unassociated.
    tag = struct.pack("<HHI", 338, 3, 1)
    data = broken.encode(Image.fromarray(stored), "TIFF").replace(tag + b"\2", tag + bytes([kind]))
    assert Image.open(BytesIO(data)).mode == ("La" if kind == 1 else "LA")
    assert np.array_equal(pixels(data), shades(level * alpha // 255 + 255 - alpha))


def test_one_bit_and_grey_keep_their_shades() -> None:
    bits = Image.fromarray(np.array([[False, True]]))
    assert bits.mode == "1"
    assert np.array_equal(pixels(broken.encode(bits, "PNG")), shades(0, 255))
    grey = Image.fromarray(np.array([[0, 100, 255]], dtype=np.uint8))
    assert np.array_equal(pixels(broken.encode(grey, "PNG")), shades(0, 100, 255))


def test_an_animation_gives_its_first_frame() -> None:
    assert pixels(broken.animated_gif()).reshape(-1, 3).tolist() == [[255, 0, 0]] * 64


def test_a_profile_is_followed_to_srgb() -> None:
    photograph = np.asarray(broken.photograph("chelsea")).astype(int)
    seen = pixels(broken.encode(broken.photograph("chelsea"), "PNG", icc_profile=broken.swapped_profile()))
    assert np.abs(seen - photograph[..., ::-1]).max() <= 2
    opaque = broken.photograph("chelsea").convert("RGBA")
    assert np.array_equal(pixels(broken.encode(opaque, "PNG", icc_profile=broken.swapped_profile())), seen)


@pytest.mark.parametrize("profile", [b"no profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()])
def test_a_broken_profile_and_srgb_change_nothing(profile: bytes) -> None:
    photograph = broken.photograph("chelsea")
    assert np.array_equal(pixels(broken.encode(photograph, "PNG", icc_profile=profile)), np.asarray(photograph))


def test_grey_takes_the_profile_of_an_rgb_image() -> None:
    grey = Image.fromarray(np.array([[0, 55, 128, 255]], dtype=np.uint8))
    seen = pixels(broken.encode(grey, "PNG", icc_profile=broken.linear_profile())).astype(int)
    # By sRGB's definition: 1.055 * (level / 255) ** (1 / 2.4) - 0.055.
    assert np.abs(seen - shades(0, 128, 188, 255)).max() <= 1


def test_grey_with_alpha_takes_its_profile() -> None:
    grey = Image.fromarray(np.array([[0, 55, 128, 255]], dtype=np.uint8))
    profile = broken.grey_profile()
    alone = pixels(broken.encode(grey, "PNG", icc_profile=profile))
    assert not np.array_equal(alone, shades(0, 55, 128, 255))
    grey.putalpha(255)
    assert np.array_equal(pixels(broken.encode(grey, "PNG", icc_profile=profile)), alone)


def test_no_metadata_is_left_to_be_written_again() -> None:
    data = broken.encode(
        broken.photograph("coffee"), icc_profile=broken.swapped_profile(), exif=b"Exif\0\0", comment="x"
    )
    assert decode(EncodedImage("a.jpg", data), LIMIT).info == {}


def test_a_fit_of_the_same_size_changes_nothing() -> None:
    photograph = broken.photograph("coffee")
    assert np.array_equal(np.asarray(fit(photograph, 400, 600)), np.asarray(photograph))


@given(st.tuples(*[st.integers(1, 80)] * 4))
@example((59, 59, 43, 43))
@settings(deadline=None)
def test_a_fit_has_the_size_and_is_scaled_until_it_just_covers_it(sizes: tuple[int, int, int, int]) -> None:
    image_width, image_height, height, width = sizes
    scale = scale_to_cover((image_width, image_height), height, width)
    assert image_width * scale == pytest.approx(width) or image_height * scale == pytest.approx(height)
    assert min(image_width * scale - width, image_height * scale - height) > -1e-6
    assert fit(Image.new("RGB", (image_width, image_height)), height, width).size == (width, height)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (128, 512), (300, 111), (800, 700)])
def test_a_fit_is_one_lanczos_resampling_of_the_middle(height: int, width: int) -> None:
    photograph = broken.photograph("coffee")
    reference = ImageOps.fit(photograph, (width, height), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(fit(photograph, height, width)).astype(int) - np.asarray(reference)).max() <= 1


def test_a_strong_reduction_stays_close_to_one_resampling() -> None:
    photograph = broken.photograph("retina")
    reference = ImageOps.fit(photograph, (64, 64), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(fit(photograph, 64, 64)).astype(int) - np.asarray(reference)).mean() < 0.5
