"""A look into a data set: its streams as a table and the first record of each."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from streaming import LocalDataset

from data_pipeline.records import Record
from wemmu.config.shards import DataSet


def inspect_dataset(root: Path, console: Console) -> None:
    """Print the streams of the data set in `root`.

    Raises:
        ShardError: if `root` holds no complete data set.
    """
    dataset = DataSet.at(root)
    table = Table("stream", "records", "MB", "bytes/record", "example", "prompt", "inputs", "target", title=str(root))
    for stream in dataset.streams:
        settings = stream.settings
        record = Record.from_columns(LocalDataset(str(root / settings.name))[0])
        target = "the input" if record.target is None else _size(*record.target.size)
        table.add_row(
            settings.name,
            str(settings.samples),
            f"{stream.bytes / 1e6:.1f}",
            f"{stream.bytes / settings.samples:.0f}",
            record.id,
            record.prompt or "(empty)",
            ", ".join(_size(*image.size) for image in record.images) or "none",
            target,
        )
    console.print(table)


def _size(width: int, height: int) -> str:
    return f"{height}x{width}"
