"""Image files of a source -> RGB images, or the reason for a rejection."""

from collections.abc import Callable
from typing import Any

from PIL import Image, UnidentifiedImageError

from data_pipeline.records import EncodedImage, Reason, RejectedError
from wemmu.images import TooManyPixelsError
from wemmu.images import decode as decode_rgb

Read = Callable[[bytes, int], Any]


def decode(image: EncodedImage, max_pixels: int, read: Read = decode_rgb) -> Any:
    """Return the first frame as RGB, converted by `wemmu.images.to_rgb` as at inference, or what `read` returns.

    Raises:
        RejectedError: EMPTY_IMAGE; NOT_AN_IMAGE if it is none of `wemmu.images.FORMATS`; TRUNCATED if the file ends
            early or is damaged; TOO_MANY_PIXELS, known from the header alone, above `max_pixels` or Pillow's own bound
            against decompression bombs.
    """
    if not image.data:
        raise RejectedError(Reason.EMPTY_IMAGE, image.name)
    try:
        return read(image.data, max_pixels)
    except UnidentifiedImageError as error:
        raise RejectedError(Reason.NOT_AN_IMAGE, f"{image.name}: {error}") from error
    except (TooManyPixelsError, Image.DecompressionBombError) as error:
        raise RejectedError(Reason.TOO_MANY_PIXELS, f"{image.name}: {error}") from error
    except MemoryError:
        raise
    # Any exception: on damaged files Pillow raises OSError, SyntaxError, struct.error, zlib.error, ...
    except Exception as error:
        raise RejectedError(Reason.TRUNCATED, f"{image.name}: {str(error) or repr(error)}") from error
