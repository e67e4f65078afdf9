"""A look into a data set: its streams as a table, then the first record of each."""

from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from streaming import LocalDataset

from data_pipeline.records import Record
from wemmu.config.shards import DataSet


def inspect_dataset(root: Path, console: Console) -> None:
    """Print the streams of the data set in `root` and an example of each; sizes are height x width.

    Raises:
        ShardError: if `root` holds no complete data set.
    """
    dataset = DataSet.at(root)
    table = Table("stream", "records", "MB", "bytes/record", title=str(root))
    for stream in dataset.streams:
        samples = stream.settings.samples
        table.add_row(stream.settings.name, f"{samples}", f"{stream.bytes / 1e6:.1f}", f"{stream.bytes / samples:.0f}")
    console.print(table)
    for stream in dataset.streams:
        record = Record.from_columns(LocalDataset(str(root / stream.settings.name))[0])
        inputs = ", ".join(map(_size, record.images)) or "none"
        target = "the input" if record.target is None else _size(record.target)
        line = f"[bold]{record.id}[/] in {stream.settings.name}: inputs {inputs}; target {target}"
        console.print(line, soft_wrap=True)
        console.print(f'  "{escape(record.prompt)}"', highlight=False, soft_wrap=True)


def _size(image: Image.Image) -> str:
    return f"{image.height}x{image.width}"
