"""Image files of a source -> RGB images, or a named reason why not."""

from PIL import Image, UnidentifiedImageError

from data_pipeline.records import PictureFile, Reason, RejectedError
from wemmu import images


def decode(picture: PictureFile, max_pixels: int) -> Image.Image:
    """The first frame as RGB, as `wemmu.images.to_rgb` makes it, so that inference sees the same.

    Raises:
        RejectedError: EMPTY_PICTURE; NOT_A_PICTURE if it is none of `wemmu.images.FORMATS`; TRUNCATED if the file ends
            early or is damaged; TOO_MANY_PIXELS, known from the header alone, above `max_pixels` or Pillow's own bound
            against decompression bombs.
    """
    if not picture.data:
        raise RejectedError(Reason.EMPTY_PICTURE, picture.name)
    try:
        return images.decode(picture.data, max_pixels)
    except UnidentifiedImageError as error:
        formats = ", ".join(images.FORMATS)
        raise RejectedError(Reason.NOT_A_PICTURE, f"{picture.name}: none of {formats}") from error
    except (images.TooManyPixelsError, Image.DecompressionBombError) as error:
        raise RejectedError(Reason.TOO_MANY_PIXELS, f"{picture.name}: {error}") from error
    except MemoryError:
        raise
    # Anything at all: on damaged files Pillow's readers raise OSError, SyntaxError, struct.error, zlib.error, ...
    except Exception as error:
        raise RejectedError(Reason.TRUNCATED, f"{picture.name}: {error}") from error
