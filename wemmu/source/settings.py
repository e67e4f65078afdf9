"""Image files that carry the settings that made them."""

import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from wemmu.config.files import replacing

# The text chunk of a PNG that holds the settings.
SETTINGS = "wemmu"


def save_image(image: Image.Image, file: Path, settings: Mapping[str, Any]) -> None:
    """Write an image in the format of its suffix, whole or not at all; a PNG carries the settings that made it."""
    form, encoded = Image.registered_extensions()[file.suffix.lower()], BytesIO()
    # In memory first: Pillow's errors of a full disk have no number.
    image.save(encoded, form)
    with replacing(file) as aside:
        aside.write_bytes(png(image, settings) if form == "PNG" else encoded.getvalue())


def png(image: Image.Image, settings: Mapping[str, Any]) -> bytes:
    """Return a PNG file that contains the settings of the image."""
    info, file = PngInfo(), BytesIO()
    info.add_text(SETTINGS, json.dumps(settings))
    image.save(file, "PNG", pnginfo=info)
    return file.getvalue()


def settings_of(image: Image.Image) -> dict[str, Any] | None:
    """Return the settings in an image that `png` wrote; None for any other."""
    text = image.info.get(SETTINGS)
    return json.loads(text) if text else None
