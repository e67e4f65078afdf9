"""The work that cannot be left out, with nothing around it."""

import io
import tarfile
from pathlib import Path

from PIL import Image
from streaming import MDSWriter

from data_pipeline.buckets import Size, buckets, nearest
from data_pipeline.plan import Job
from wemmu.images import fit


def images(tars: Path) -> list[bytes]:
    """The image files of the tars."""
    found = []
    for path in sorted(tars.iterdir()):
        with tarfile.open(path, encoding="utf-8") as tar:
            found += [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]
    return found


def buckets_of(files: list[bytes], job: Job) -> list[list[Size]]:
    """The bucket of each image at each resolution."""
    (resolutions,) = job.resolutions.values()
    sizes = [Image.open(io.BytesIO(file)).size[::-1] for file in files]
    return [[nearest(size, buckets(r, job.prepare.pictures)) for r in resolutions] for size in sizes]


def encode(files: list[bytes], sizes: list[list[Size]], quality: int) -> list[list[bytes]]:
    """Decode each image once, fit it into its buckets, encode."""
    made = []
    for file, chosen in zip(files, sizes, strict=True):
        image = Image.open(io.BytesIO(file)).convert("RGB")
        row = []
        for size in chosen:
            buffer = io.BytesIO()
            fit(image, *size).save(buffer, "JPEG", quality=quality, subsampling=0)
            row.append(buffer.getvalue())
        made.append(row)
    return made


def mds(made: list[list[bytes]], out: Path) -> None:
    """The images alone, as one data set."""
    with MDSWriter(columns={"target": "bytes"}, out=str(out), hashes=["sha256"]) as writer:
        for row in made:
            for file in row:
                writer.write({"target": file})
