"""Data sets that Hugging Face's `datasets` saved with `save_to_disk`."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.records import RawRecord, Reason, RejectedError, Rejection, SourcePartition
from data_pipeline.sources.captioned import captioned
from data_pipeline.sources.common import record_or_rejection
from data_pipeline.sources.rows import check_fields
from data_pipeline.sources.table import columns
from wemmu.config import ConfigError, prepare

if TYPE_CHECKING:
    from datasets import Dataset


class HuggingFaceSource:
    """Text-to-image records; a part is a range of rows."""

    version = 2

    def __init__(self, config: prepare.HuggingFaceSource):
        self._config = config

    def files(self) -> list[tuple[str, int]]:
        """Return nothing: listing needs `datasets`, whose import takes seconds."""
        return []

    def parts(self, size: int) -> list[SourcePartition]:
        dataset = self._open()
        stored = sum(Path(file["filename"]).stat().st_size for file in dataset.cache_files)
        ranges = [(first, min(first + size, len(dataset))) for first in range(0, len(dataset), size)]
        return [
            SourcePartition(self._config.name, f"{first}-{end - 1}", {"first": first, "end": end, "size": stored})
            for first, end in ranges
        ]

    def read(self, part: SourcePartition) -> Iterator[RawRecord | Rejection]:
        dataset = self._open()
        for row in range(part.place["first"], part.place["end"]):
            yield record_or_rejection(part, str(row), partial(self._record, dataset, row))

    def _record(self, dataset: "Dataset", row: int) -> RawRecord:
        try:
            fields = dataset[row].to_pylist()[0]
        except UnicodeDecodeError as error:
            raise RejectedError(Reason.BAD_TEXT, str(error)) from error
        return captioned(self._config, str(row), fields, None)

    def _open(self) -> "Dataset":
        """Return the needed columns as they are stored; by default `datasets` would decode images."""
        config, dataset = self._config, self._split()
        names = columns(config, ("image", "caption"))
        check_fields(config.name, config.path, dataset.column_names, names)
        return dataset.select_columns(list(names.values())).with_format("arrow")

    def _split(self) -> "Dataset":
        # The import takes seconds, so only a process that reads such a source does it.
        from datasets import DatasetDict, load_from_disk

        config = self._config
        try:
            dataset = load_from_disk(config.path)
        # Any exception: a truncated file or a Git LFS pointer raises KeyError, TypeError, ArrowInvalid, ...
        except Exception as error:
            expected = "expected what datasets' save_to_disk wrote"
            raise ConfigError(f"source {config.name}: path: cannot load {config.path} ({error}); {expected}") from error
        splits = list(dataset) if isinstance(dataset, DatasetDict) else []
        if config.split is None and not splits:
            return dataset
        if config.split not in splits:
            choices = f"one of {', '.join(splits)}" if splits else "none: the data set has no splits"
            raise ConfigError(
                f"source {config.name}: split: {config.split} is not in {config.path}; expected {choices}"
            )
        return dataset[config.split]
