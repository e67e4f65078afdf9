"""Images inside a page: files as addresses of themselves."""

import base64
import io
from pathlib import Path

from PIL import Image

# px of the longer side: shown at about half of it, sharp on fine screens too.
LONGEST = 256
# Up to this side pixels are kept as they are.
PIXELATED = 96


def png_uri(file: Path) -> str:
    """A PNG file as the address of itself."""
    return _uri("png", file.read_bytes())


def thumbnail(file: bytes) -> str:
    """The bytes of an image file as the address of a small copy; very small images stay what they are."""
    image = Image.open(io.BytesIO(file)).convert("RGB")
    kind = "png" if max(image.size) <= PIXELATED else "jpeg"
    image.thumbnail((LONGEST, LONGEST))
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=82)
    return _uri(kind, buffer.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
