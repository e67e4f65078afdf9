"""The report as one page that needs nothing else: pictures are inside it, and nothing is loaded from anywhere."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from data_pipeline.contents import records
from data_pipeline.ledger import CAPTION_EDGES, SIDE_EDGES
from data_pipeline.report_record import Report, in_order
from data_pipeline.report_text import bins, plain
from wemmu.config.shards import DataSet, StoredRecord, Stream
from wemmu.config.task import Task

NAMES = {
    Task.T2I: "Text to picture",
    Task.RECONSTRUCTION: "Reconstruction",
    Task.UNCONDITIONAL: "No request at all",
    Task.EDIT: "Edit",
    Task.MULTI_EDIT: "Edit of several pictures",
    Task.UNDERSTANDING: "Understanding",
}
# Records shown of each stream, and of all together: with hundreds of buckets the page must still open.
SHOWN, SHOWN_IN_ALL = 8, 400
# px of the longer side of a picture in the page: shown at half of it, sharp on fine screens too.
THUMBNAIL = 256
# Up to this side pixels are kept as they are.
PIXELATED = 96


@dataclass(frozen=True)
class Card:
    """An example record; pictures are addresses of themselves, `target` None where none is made of its own."""

    id: str
    prompt: str
    answer: str
    inputs: tuple[str, ...]
    target: str | None


def page(report: Report, dataset: DataSet) -> str:
    """The HTML of a report, with the first records of every stream."""
    environment = Environment(
        loader=PackageLoader("data_pipeline"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": "{:,}".format, "size": size, "percent": percent}
    return environment.get_template("report.html.j2").render(
        report=report,
        names=NAMES,
        samples=_samples(report.root, dataset.streams),
        resolutions=sorted({s.resolution for s in report.streams}),
        histograms=[
            ("Shorter side of the source’s picture", "px", bins(report.sides, SIDE_EDGES)),
            ("Length of the prompt", "characters", bins(report.captions, CAPTION_EDGES)),
        ],
    )


def _samples(root: Path, streams: Sequence[Stream]) -> list[dict[str, Any]]:
    """By task, then by resolution (the highest first), then by stream: its first records."""
    number = max(1, min(SHOWN, SHOWN_IN_ALL // len(streams)))
    tasks = []
    for task, of_task in groupby(in_order(streams), key=lambda s: s.settings.task):
        resolutions = [
            {
                "resolution": resolution,
                "streams": [{"stream": s, "cards": [card(r) for r in islice(records(root, s), number)]} for s in same],
            }
            for resolution, same in groupby(of_task, key=lambda s: s.settings.resolution)
        ]
        tasks.append({"task": task, "resolutions": resolutions[::-1]})
    return tasks


def card(record: StoredRecord) -> Card:
    return Card(
        id=plain(record.id),
        prompt=plain(record.prompt, 280),
        answer=plain(record.answer, 280),
        inputs=tuple(map(thumbnail, record.images)),
        target=thumbnail(record.target) if record.target else None,
    )


def thumbnail(file: bytes) -> str:
    """A picture file as the address of a small copy of itself; very small pictures stay what they are."""
    image = Image.open(io.BytesIO(file)).convert("RGB")
    exact = max(image.size) <= PIXELATED
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if exact else "JPEG", quality=82)
    return f"data:image/{'png' if exact else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def percent(share: float) -> str:
    """0.935 -> `93.5 %`; a narrow space keeps number and sign together."""
    return f"{100 * share:.1f}\u202f%"


def size(count: int) -> str:
    """Bytes as `1.2 MB`."""
    return f"{count / 1e6:,.1f}\u202fMB" if count < 1e9 else f"{count / 1e9:,.2f}\u202fGB"
