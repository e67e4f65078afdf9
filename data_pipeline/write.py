"""Writes the data set of a curriculum: keeps finished partitions, writes the others, then writes the record."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pydantic_core import to_json
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipeline.chain import Services
from data_pipeline.cluster import Workers
from data_pipeline.cluster import workers as start_workers
from data_pipeline.ledger import Entry, Ledger, begin, refuse_other_settings, streams_of
from data_pipeline.plan import Job, Settings, files_of, plan
from data_pipeline.records import SourcePartition
from data_pipeline.report_record import JSON_FILE
from wemmu.config import ConfigError, Curriculum
from wemmu.config.base import differences
from wemmu.config.files import replace_text
from wemmu.config.prepare import StoredSource
from wemmu.config.serving import check_preparable, check_readable, needs
from wemmu.config.shards import (
    DATASET_FILE,
    INDEX_FILE,
    REJECTED_FILE,
    SETTINGS_FILE,
    DataSet,
    ShardError,
    Stream,
    StreamSettings,
)
from wemmu.locks import hold, lease_s

# Number of records from which the share of damaged ones can stop the job.
ENOUGH = 1000


def write(curriculum: Curriculum, console: Console, workers: int | None = None, ray: str | None = None) -> DataSet:
    """Make the directory `curriculum.data.shards` hold the data set that the stages read.

    A complete data set is recognized in milliseconds, without importing ray or streaming. An incomplete one is
    finished. Workers are processes of a local Ray cluster, or of the cluster at the address `ray`.

    Raises:
        ConfigError: if the curriculum prepares no data, or there is nothing at a source's path.
        ShardError: if the directory holds something else, another process writes into it, the sources have changed
            since writing began, too many records are damaged, or a stage has no record of one of its tasks: before
            writing if no source can have any, otherwise at the end; what is written stays.
    """
    dataset = _written(curriculum, console, workers, ray)
    check_readable(curriculum.data.shards, dataset.streams, needs(curriculum.stages))
    return dataset


def _written(curriculum: Curriculum, console: Console, workers: int | None, ray: str | None) -> DataSet:
    job = plan(curriculum)
    finished = (job.root / DATASET_FILE).exists()
    refuse_other_settings(job.root, Settings.of(job), finished)
    if finished:
        dataset = DataSet.at(job.root)
        console.print(f"{job.root} is complete: {_summary(dataset)}; nothing to write")
        _tell_of_changes(job, console)
        if not (job.root / JSON_FILE).exists():
            _report(curriculum, dataset, console)
        return dataset
    check_preparable(curriculum, job.prepare)
    job.root.mkdir(parents=True, exist_ok=True)
    with _only_writer(job.root):
        start = time.monotonic()
        dataset = _write(job, console, workers, ray)
        console.print(f"{job.root} is complete: {_summary(dataset)}; it took {time.monotonic() - start:.1f} s")
    _report(curriculum, dataset, console)
    return dataset


def _tell_of_changes(job: Job, console: Console) -> None:
    """Print which sources of a finished data set would now give other records: new files or a new version."""
    if not (job.root / SETTINGS_FILE).exists():
        return
    before = Settings.load(job.root / SETTINGS_FILE)
    if older := [name for name, version in Settings.of(job).sources.items() if before.sources.get(name) != version]:
        console.print(
            f"! An earlier version of this program read the source {', '.join(older)}; to get the records as it reads "
            "them now, set data.shards to another directory"
        )
    for source, files in before.files.items():
        try:
            now = files_of(job, source)
        except (ConfigError, OSError):
            # A finished data set no longer needs its sources.
            continue
        if now != files:
            console.print(
                f"! The source {source} has changed since: {files[0]} files then, {now[0]} now, or of other sizes. "
                f"The data set does not hold the changes; to get them, set data.shards to another directory"
            )


def _report(curriculum: Curriculum, dataset: DataSet, console: Console) -> None:
    """Write and print the report. The data set is complete without it, so an error here is only printed."""
    # Imported late: a run on a complete data set needs neither images nor templates.
    from data_pipeline.report import write_report

    try:
        with _only_writer(curriculum.data.shards):
            console.print("\n" + write_report(curriculum, dataset))
    except Exception as error:
        # An OSError's words name the file, its repr does not.
        why = str(error) if isinstance(error, OSError) else repr(error)
        console.print(f"The report could not be written ({why}). Run the same command to try again")


def _summary(dataset: DataSet) -> str:
    samples, size = (sum(getattr(s, field) for s in dataset.streams) for field in ("samples", "bytes"))
    streams = len(dataset.streams)
    return f"{streams} stream{'s' * (streams != 1)}, {samples} records, {size / 1e6:.1f} MB"


def _write(job: Job, console: Console, workers: int | None, address: str | None) -> DataSet:
    parts = job.parts()
    damage, finished, encoded = Damage(job), set(), set[StreamSettings]()
    # Containers that are known to be lost before reading: the user can still fix the sources and write here.
    damage.lose((p.source, p.name, p.place["broken"]) for p in parts if "broken" in p.place)
    begin(job.root, Settings.of(job, parts))
    ledger = Ledger(job.root)
    for entry in ledger.finished(len(parts)):
        damage.count(entry)
        finished.add(entry.number)
        encoded |= {stream.settings for stream in entry.streams if stream.settings.latents}
    damage.check_lost()
    ledger.clear_unfinished(finished)
    if missing := [number for number in range(len(parts)) if number not in finished]:
        console.print(f"{job.root}: {len(missing)} of {len(parts)} partitions to write")
        with start_workers(workers, address) as started:
            _write_missing(job, parts, missing, damage, console, started, encoded)
    return finish(job, len(parts))


def _write_missing(
    job: Job,
    parts: list[SourcePartition],
    missing: list[int],
    damage: "Damage",
    console: Console,
    workers: Workers,
    encoded: Iterable[StreamSettings],
) -> None:
    from data_pipeline.duplicates import Scan, duplicates, scan_file, scan_part
    from data_pipeline.partitions import write_partition

    def looked_through(scan: Scan) -> int:
        damage.lose((r.source, r.part, r.detail) for r in scan.lost)
        return scan.records

    dropped = [frozenset[int]()] * len(parts)
    if job.prepare.keep.duplicates == "drop" and any(isinstance(s, StoredSource) for s in job.prepare.sources):
        scan_file(job.root, 0).parent.mkdir(exist_ok=True)
        unread = [n for n in range(len(parts)) if not scan_file(job.root, n).exists()]
        scans = workers.run(scan_part, ((job, n, parts[n]) for n in unread))
        _show(console, "looking for duplicates", len(unread), map(looked_through, scans))
        dropped = duplicates(job.root, len(parts))
    services = workers.services(job)
    _refuse_other_latents(job, encoded, services)
    written = workers.run(write_partition, ((job, n, parts[n], dropped[n], services) for n in missing))
    _show(console, "writing", len(missing), map(damage.add, written))


def _refuse_other_latents(job: Job, encoded: Iterable[StreamSettings], services: Services) -> None:
    """Raise ShardError unless the autoencoder computes latents like those of the finished streams `encoded`."""
    for stream in encoded:
        if services.latents is None or stream.latents is None:
            continue
        here = services.latents((stream.height, stream.width))
        if differ := list(differences(here.model_dump(), stream.latents.model_dump())):
            told = "; ".join(f"{field}: {now}, not {before}" for field, now, before in differ)
            raise ShardError(
                f"the finished partitions of {job.root} have latents of another autoencoder than backbones.vae, "
                f"{job.vae}: now {told}. Set backbones.vae to that one, or data.shards to another directory"
            )


class Damage:
    """Counts records and lost containers, and stops the job when there are too many damaged or lost ones."""

    def __init__(self, job: Job):
        self._job, self._read = job, 0
        self._reasons = Counter[str]()
        self._unsuitable = Counter[str]()
        self._unused = Counter[str]()
        self._example = ""
        # (source, part) -> what is wrong with it.
        self._lost: dict[tuple[str, str], str] = {}

    def lose(self, containers: Iterable[tuple[str, str, str]]) -> None:
        """Count lost containers (source, part, reason), each once; raises as `check_lost`."""
        for source, part, reason in containers:
            self._lost.setdefault((source, part), reason)
        self.check_lost()

    def check_lost(self) -> None:
        """Raise ShardError if there are more lost containers than `max_lost_containers`."""
        lost, allowed = self._lost, self._job.prepare.max_lost_containers
        if len(lost) > allowed:
            some = "; ".join(f"{source}/{part}: {reason}" for (source, part), reason in list(lost.items())[:3])
            more = f"; and {len(lost) - 3} more" if len(lost) > 3 else ""
            raise ShardError(
                f"tars or files not readable to the end: {len(lost)}, but data.prepare.max_lost_containers allows "
                f"{allowed}. {some}{more}. The number of records in them is unknown. Restore them and run the same "
                "command again (into another directory once a partition is finished), or allow that many"
            )

    def count(self, entry: Entry) -> None:
        self._read += entry.read
        self._unused.update(entry.unused)
        for rejected in entry.rejected:
            if rejected.reason.lost:
                self._lost.setdefault((rejected.source, rejected.part), rejected.detail)
            if rejected.reason.damaged:
                self._reasons[rejected.reason] += 1
                self._example = (
                    f"{rejected.source}/{rejected.key or rejected.part}: {rejected.detail or rejected.reason}"
                )
            else:
                self._unsuitable[rejected.reason] += 1

    def add(self, entry: Entry) -> int:
        """Count an entry; returns its number of records.

        Raises:
            ShardError: if the share of damaged records is above `max_damaged`.
        """
        self.count(entry)
        self.check_lost()
        if self._read >= ENOUGH:
            self.check()
        return entry.read

    def nothing_left(self) -> str:
        """Return why no record is left."""
        if not self._read:
            return "the sources hold no record at all"
        unsuitable = _frequent(self._unsuitable)
        listed = f". {REJECTED_FILE} in it lists all that a stage mixes" if unsuitable or self._reasons else ""
        return "; ".join(filter(None, (unsuitable, self.said()))) + listed

    def said(self) -> str:
        """Return the most frequent reasons of damage and an example."""
        reasons = _frequent(self._reasons)
        unused = ", ".join(f"{count} are {task}, which no stage mixes" for task, count in self._unused.items())
        damaged = f"{reasons}. One of them: {self._example}" if reasons else "none was damaged"
        return f"{unused}; {damaged}" if unused else damaged

    def check(self) -> None:
        self.check_lost()
        damaged, allowed = self._reasons.total(), self._job.prepare.max_damaged
        if damaged > allowed * self._read:
            raise ShardError(
                f"{damaged} of {self._read} records are damaged, more than data.prepare.max_damaged allows "
                f"({allowed:.0%}): {self.said()}. What is written so far stays; fix the "
                "source and write into another directory, or allow more and run the same command again"
            )


def _frequent(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(4))


def finish(job: Job, parts: int) -> DataSet:
    """Index every stream, list the rejected records, write the record of the data set.

    Raises:
        ShardError: if a partition is missing, too many records are damaged, or there is no stream.
    """
    entries = list(Ledger(job.root).finished(parts))
    if len(entries) < parts:
        there = {entry.number for entry in entries}
        missing = next(n for n in range(parts) if n not in there)
        raise ShardError(f"partition {missing} of {job.root} is missing or damaged; run the same command again")
    damage = Damage(job)
    for entry in entries:
        damage.count(entry)
    damage.check()
    replace_text(
        job.root / REJECTED_FILE,
        "".join(to_json(r).decode() + "\n" for entry in entries for r in entry.rejected),
    )
    if not (held := streams_of(entries)):
        raise ShardError(f"no record is left for {job.root}: {damage.nothing_left()}")
    dataset = DataSet(streams=tuple(_indexed(job.root, stream, shards) for stream, shards in held))
    dataset.save(job.root / DATASET_FILE)
    return dataset


def _indexed(root: Path, stream: Stream, shards: list[dict[str, Any]]) -> Stream:
    """Write the index that makes one MDS data set of all partitions; returns the stream with it."""
    index = json.dumps({"version": 2, "shards": shards}, sort_keys=True)
    replace_text(root / stream.settings.name / INDEX_FILE, index)
    files = {**stream.files, INDEX_FILE: hashlib.sha256(index.encode()).hexdigest()}
    return stream.model_copy(update={"files": files})


def _only_writer(root: Path) -> AbstractContextManager[int]:
    return hold(
        root / ".lock", lambda _: f"another process is writing into {root}; wait for it to end", patience_s=lease_s()
    )


def _show(console: Console, what: str, total: int, records: Iterator[int]) -> None:
    """Show progress by partition and the rate in records; `records` yields the count of each partition."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("partitions  {task.fields[rate]:.0f} records/s  left:"),
        TimeRemainingColumn(),
    )
    start, done = time.monotonic(), 0
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(what, total=total, rate=0.0)
        for count in records:
            done += count
            progress.update(bar, advance=1, rate=done / (time.monotonic() - start))
