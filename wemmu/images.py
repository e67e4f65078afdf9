"""Image files and PIL images of any mode -> upright RGB in sRGB, fitted to a size: the same for training and inference.

JPEG's draft mode (decoding at 1/2, 1/4, 1/8) is not used: the size that comes out would no longer be the image's own,
by which it is selected and put in a bucket. `fit` gets most of the gain: 12 Mpx to 512 px takes 153 ms plainly, 101 ms
with the coarse first step there, 72 ms with draft mode; at 1 Mpx neither matters.
"""

import warnings
from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

# The inverse of each EXIF orientation. ImageOps.exif_transpose also rewrites the metadata, which fails if they are
# damaged and which nobody reads afterwards.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Orientations that swap width and height.
SIDEWAYS = (5, 6, 7, 8)

# The mode that a profile of each colour space (as its header names it) is made for.
_PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_SRGB = ImageCms.createProfile("sRGB")
# Grey PNGs of 2 and 4 bits, and what Pillow multiplies their levels with.
_GREY_STEPS = {"L;2": 85, "L;4": 17}


class TooManyPixelsError(ValueError):
    """An image is larger than allowed; the message says its size."""


def decode(data: bytes, max_pixels: int | None = None) -> Image.Image:
    """Return the first frame of an image file as RGB; see `to_rgb`.

    Raises:
        TooManyPixelsError: above `max_pixels`, known from the header alone.
        PIL.UnidentifiedImageError: if it is none of `FORMATS`. Image.DecompressionBombError: above Pillow's own bound
            (twice `Image.MAX_IMAGE_PIXELS`, 179 million). Of damaged files, whatever Pillow's readers raise.
    """
    with _open(data, max_pixels) as image:
        _scale_transparent(image)
        image.load()
        return to_rgb(image)


def upright_size(data: bytes, max_pixels: int | None = None) -> tuple[int, int]:
    """Return (width, height) after `decode`, from the header alone. Raises like `decode` if the header shows it."""
    with _open(data, max_pixels) as image:
        return image.size[::-1] if _orientation(image) in SIDEWAYS else image.size


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit sRGB: upright by EXIF orientation, colours by the ICC profile, white where transparent.

    A profile that is broken or made for another kind of image is ignored, that is, the colours are taken as sRGB's;
    EXIF data that cannot be read, as upright. The result carries no metadata, so that none is written with it.

    Raises:
        ValueError: if none of its levels, where they are floats, is finite.
    """
    _scale_transparent(image)
    return _rgb(_upright(image))


def scale_to_cover(image_size: tuple[int, int], height: int, width: int) -> float:
    """Return the factor that scales an image of `image_size` (width, height) to cover height x width px."""
    return max(width / image_size[0], height / image_size[1])


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale the image until it covers height x width px, and crop both sides evenly."""
    scale = scale_to_cover(image.size, height, width)
    # Rounding can put a side that fits exactly a hair outside of the image, which Pillow refuses.
    over_x, over_y = max(0.0, image.width - width / scale), max(0.0, image.height - height / scale)
    box = (over_x / 2, over_y / 2, image.width - over_x / 2, image.height - over_y / 2)
    # From a fourfold reduction on, blocks of pixels are averaged first: half the time, under 1 of 255 levels apart on
    # average (JPEG at 95 loses as much).
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=2.0)


def _open(data: bytes, max_pixels: int | None) -> Image.Image:
    with warnings.catch_warnings():
        # Between one and two times MAX_IMAGE_PIXELS Pillow only warns; the limit there is the caller's.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError as error:
            # Pillow's words name an object in memory.
            raise UnidentifiedImageError(f"none of {', '.join(FORMATS)}") from error
    if max_pixels is not None and image.width * image.height > max_pixels:
        raise TooManyPixelsError(f"{image.width} x {image.height}")
    return image


def _scale_transparent(image: Image.Image) -> None:
    """Bring the transparent level or colour of a PNG to 8 bits. Pillow does so only with the pixels, in `load`.

    Of a 16-bit colour it keeps the high bytes; colours that differ less become transparent, too.
    """
    if not isinstance(image, PngImageFile) or not image.tile or "transparency" not in image.info:
        return
    bits = str(image.tile[0].args)
    if bits in _GREY_STEPS:
        image.info["transparency"] *= _GREY_STEPS[bits]
    elif bits == "RGB;16B":
        image.info["transparency"] = tuple(level >> 8 for level in image.info["transparency"])


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        # As in `decode`, anything at all; the pixels are fine without it.
        return None


def _upright(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _rgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    colors, alpha = _split_alpha(_eight_bit(image))
    colors = _srgb(colors, profile)
    on_white = Image.new("RGB", image.size, "white")
    on_white.paste(colors, mask=alpha)
    return on_white


def _eight_bit(image: Image.Image) -> Image.Image:
    """8 bits a channel; Pillow's own conversion of the deep modes would clip at 255 instead of scaling."""
    if image.mode in ("F", "I"):
        levels = np.asarray(image, dtype=np.float64)
        if not np.isfinite(levels).any():
            raise ValueError("the image holds no finite level, only NaN or infinities")
        levels = np.nan_to_num(levels).clip(0)
        # Floats and 32-bit integers have no white of their own: it is the first of those in use that holds all levels,
        # or all but highlights.
        highest = np.percentile(levels, 99)
        ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        white = next((top for top in ranges if highest <= top), highest)
    elif image.mode.startswith("I"):
        # "I;16" and its byte orders.
        levels, white = np.asarray(image).astype(np.float64), 65535.0
    else:
        return image
    grey = Image.fromarray((levels / white * 255).clip(0, 255).round().astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.asarray(image) != image.info["transparency"]).convert("L"))
    return grey


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours in one of the modes that profiles are made for (L, RGB, CMYK), and the opacity if there is any."""
    if image.has_transparency_data:
        # An alpha channel, or a palette entry, level or colour that is declared transparent.
        grey = image.mode in ("1", "L", "LA", "La")
        # From premultiplied grey Pillow converts only to LA.
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return image.getchannel("R") if grey else image.convert("RGB"), image.getchannel("A")
    if image.mode == "1":
        return image.convert("L"), None
    # Palette, YCbCr, LAB, HSV and padded modes: of colours that RGB has too.
    return image if image.mode in _PROFILE_MODES.values() else image.convert("RGB"), None


def _srgb(colors: Image.Image, profile: bytes | None) -> Image.Image:
    transform = _to_srgb(profile, colors.mode) if profile else None
    if transform is None:
        # CMYK stands inverted in JPEGs, as Adobe writes it; Pillow has undone that on loading.
        return colors.convert("RGB")
    mode, cms = transform
    return cms.apply(colors.convert(mode))


@lru_cache(maxsize=32)
def _to_srgb(profile: bytes, mode: str) -> tuple[str, ImageCms.ImageCmsTransform] | None:
    """The mode to bring an image of `mode` to and the transform from there; None if there is nothing to be done."""
    try:
        opened = ImageCms.ImageCmsProfile(BytesIO(profile))
        made_for = _PROFILE_MODES.get(opened.profile.xcolor_space)
        # Grey images often carry the profile of the RGB image that they once were.
        if made_for is None or (made_for != mode and (made_for, mode) != ("RGB", "L")):
            return None
        transform = ImageCms.buildTransform(opened, _SRGB, made_for, "RGB")
    except (OSError, ImageCms.PyCMSError):
        return None
    return None if made_for == "RGB" and _changes_nothing(transform) else (made_for, transform)


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether it is sRGB to sRGB up to rounding, as most are: tried on a grid of colours, it saves 10 ms for 1 Mpx."""
    levels = np.linspace(0, 255, 18).astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 18, 3)
    moved = np.asarray(transform.apply(Image.fromarray(grid)), dtype=int) - grid
    return bool(np.abs(moved).max() <= 1)
