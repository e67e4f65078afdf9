"""Reads and hashes a whole data set again, and names every difference from what was written."""

import hashlib
import os
import signal
import time
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from data_pipeline.contents import Contents, look, shard_files
from data_pipeline.ledger import Ledger, streams_of
from data_pipeline.records import WorkerError
from data_pipeline.swapped import Growth, suspects
from data_pipeline.verify_shard import Check, Checked, Problem, check_shard
from wemmu.config.shards import COLUMNS, DATASET_FILE, INDEX_FILE, REJECTED_FILE, REWRITE, ShardError, Stream
from wemmu.mds import Shard, read_index

# Stream -> shard ("PARTITION/FILE") -> its number of records.
Samples = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Verified:
    """What was read of a data set and found in it. bytes: of its shards."""

    complete: bool
    streams: int
    shards: int
    records: int
    bytes: int
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether the data set is complete and undamaged."""
        return self.complete and not self.problems


def verify(root: Path, console: Console, workers: int | None = None) -> Verified:
    """Print each problem and a summary; return what was found.

    Warns of sources whose inputs and targets look swapped, which does not count as damage.

    Reads shards in `workers` processes (default: by the number of cores and the size of the data). Each needs the
    memory of a record; this process needs 8 bytes per record of one stream, to find duplicate ids.

    Raises:
        ShardError: if `root` holds no data set of this version.
    """
    start, problems, records, size, grown = time.monotonic(), list[Problem](), 0, 0, list[Growth]()
    contents = look(root)
    samples, ledger_problems = _ledger(contents)
    checks = [
        Check(root, stream.settings, name, stream.files[name], samples[stream.settings.name].get(name))
        for stream in contents.streams
        for name in shard_files(stream)
    ]

    def tell(found: Iterable[Problem]) -> None:
        for problem in found:
            problems.append(problem)
            console.print(str(problem), style="red")

    tell(ledger_problems)
    for stream in contents.streams if contents.complete else ():
        tell(_index_problems(root, stream, samples[stream.settings.name]))
    # Another process reads this much in the seconds that a new one takes to start.
    worth = 1 + sum(stream.bytes for stream in contents.streams) // 2**27
    workers = workers or min(len(os.sched_getaffinity(0)), worth)
    with Progress(console=console, transient=True) as progress, closing(_in_order(checks, workers)) as results:
        bar = progress.add_task("verifying", total=len(checks))
        for _, shards in groupby(zip(checks, results, strict=True), key=lambda pair: pair[0].settings):
            ids = []
            for check, checked in shards:
                tell(checked.problems)
                records, size = records + len(checked.ids), size + checked.bytes
                ids.append((check, checked.ids))
                grown += checked.growth
                progress.advance(bar)
            tell(_repeated_ids(ids))
    for warning in (warnings := tuple(suspects(grown))):
        console.print(warning, style="yellow")
    read = (
        f"{records:,} records in {len(checks)} shards of {len(contents.streams)} streams, {size / 1e6:,.1f} MB, in "
        f"{time.monotonic() - start:.1f} s"
    )
    _conclude(contents, console, len(problems), read)
    return Verified(contents.complete, len(contents.streams), len(checks), records, size, tuple(problems), warnings)


def _conclude(contents: Contents, console: Console, problems: int, read: str) -> None:
    if not contents.complete:
        console.print(
            f"{contents.root} is incomplete: it has no {DATASET_FILE}, and {contents.finished} of its {contents.parts} "
            f"partitions are finished; {REWRITE} to write the rest",
            style="red",
        )
    if problems:
        console.print(f"{problems} problem{'s' if problems > 1 else ''}; read: {read}", style="red")
    else:
        console.print(f"Every record and every file {'is' if contents.complete else 'that is there is'} whole: {read}")


def _in_order(checks: list[Check], workers: int) -> Generator[Checked, None, None]:
    if workers < 2:
        yield from map(check_shard, checks)
        return
    # Spawn, not fork: this process has the progress bar's thread.
    with ProcessPoolExecutor(workers, get_context("spawn"), _end_with_parent) as pool:
        try:
            # Ctrl-C in a terminal reaches all processes; the workers, which inherit the mask, leave it to this one.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                results = pool.map(check_shard, checks)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            yield from results
        except BrokenProcessPool as error:
            raise WorkerError(
                "a reading process ended, perhaps for want of memory; run the same command again, with --workers 1 to "
                "read in one process"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """End this worker when its parent is killed; a pool's worker would wait for more work forever."""
    parent = parent_process()
    assert parent is not None, "this is a worker"

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def _repeated_ids(shards: list[tuple[Check, NDArray[np.uint64]]]) -> Iterator[Problem]:
    """Yield a problem for every record whose id an earlier record of the stream has."""
    hashes = np.concatenate([ids for _, ids in shards])
    values, counts = np.unique(hashes, return_counts=True)
    again = np.isin(hashes, values[counts > 1])
    ends = np.cumsum([len(ids) for _, ids in shards])[:-1]
    first: dict[str, str] = {}
    for (check, _), repeated in zip(shards, np.split(again, ends), strict=True):
        for number in np.flatnonzero(repeated).tolist():
            name = str(Shard.of_ours(check.path).record(number)["id"], "utf-8", "replace")
            if name in first:
                what = f"its id {name} is also that of {first[name]}"
                yield Problem(str(check.path), number, what, "give every record of the source a unique key")
            first.setdefault(name, f"{check.path}, record {number}")


def _ledger(contents: Contents) -> tuple[Samples, list[Problem]]:
    """Return the shards in the ledger, and the problems of a ledger that should be complete."""
    root, problems, entries = contents.root, [], list(Ledger(contents.root).entries(contents.parts))
    samples = defaultdict[str, dict[str, int]](dict)
    for stream, shards in streams_of(entries):
        samples[stream.settings.name] |= {shard["raw_data"]["basename"]: shard["samples"] for shard in shards}
    if not contents.complete:
        return samples, []
    remedy = _indexed_anew(root)
    for number in sorted(set(range(contents.parts)) - {entry.number for entry in entries}):
        file = str(Ledger(root).entry_file(number))
        problems.append(Problem(file, None, "it is missing or cannot be read", remedy))
    lines, rejected = _lines(root / REJECTED_FILE), sum(len(entry.rejected) for entry in entries)
    if lines != rejected and not problems:
        what = f"it lists {lines} records, the ledger {rejected}"
        problems.append(Problem(str(root / REJECTED_FILE), None, what, remedy))
    return samples, problems


def _lines(path: Path) -> int:
    """0 without the file."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _index_problems(root: Path, stream: Stream, in_ledger: dict[str, int]) -> list[Problem]:
    """Return the differences between the record of a stream, its index and the ledger."""
    directory = root / stream.settings.name
    path = directory / INDEX_FILE
    try:
        shards = read_index(directory)
    except ShardError as error:
        return [Problem(str(path), None, f"it {str(error).removeprefix(f'{path} ')}", _indexed_anew(root))]
    found = []
    if (digest := hashlib.sha256(path.read_bytes()).hexdigest()) != stream.files.get(INDEX_FILE):
        found.append(f"its sha256 is {digest}, not {stream.files.get(INDEX_FILE)}")
    if not all(shard.is_ours for shard in shards):
        found.append(f"it has other columns than this version of the layout, {', '.join(COLUMNS)}, or compressed ones")
    indexed = {str(shard.path.relative_to(directory)): shard.samples for shard in shards}
    if set(shard_files(stream)) != set(indexed):
        found.append(f"it names other shards than {DATASET_FILE}")
    if sum(indexed.values()) != stream.samples:
        found.append(f"it has {sum(indexed.values())} records, {DATASET_FILE} says {stream.samples}")
    for name in sorted(in_ledger.keys() | indexed.keys()):
        mine, other = indexed.get(name, 0), in_ledger.get(name, 0)
        if mine != other:
            found.append(f"it has {mine} records of {name}, the ledger {other}")
    return [Problem(str(path), None, what, _indexed_anew(root)) for what in found]


def _indexed_anew(root: Path) -> str:
    return f"delete {root / DATASET_FILE} and {REWRITE}"
