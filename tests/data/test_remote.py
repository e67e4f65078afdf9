"""A data set elsewhere reads like one that is here, in as little room as was given, by as many readers as there are."""

import http.server
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from tests.data import handmade
from tests.data.handmade import make_curriculum, photographs, shapes, stream
from wemmu.config.shards import DATASET_FILE, DataSet, ShardError, Stream
from wemmu.config.task import Task
from wemmu.data import mixture
from wemmu.data.loader import Loader
from wemmu.data.remote import ShardCache, _locked
from wemmu.data.shards import ShardStream
from wemmu.data.streams import open_streams
from wemmu.prompts import PromptEncoder

fork = multiprocessing.get_context("fork")
# 14 shards of 4 photographs and 6 of 4 edits.
STREAMS = {stream(Task.T2I): photographs(53), stream(Task.EDIT): shapes(Task.EDIT, 22)}
SHARD = "t2i/32/32x32/00003/shard.00000.mds"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("far-away")
    handmade.write(root, STREAMS, partition=4)
    return root


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of three shards or four."""
    monkeypatch.setattr(mixture, "WINDOW", 12)


class Server(http.server.ThreadingHTTPServer):
    """A web server of this machine; `answer` may change what it sends for a path."""

    def __init__(self, root: Path):
        self.asked: Counter[str] = Counter()
        self.answer: Callable[[str, int, bytes], bytes] = lambda path, time, content: content
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.lstrip("/")
                server.asked[name] += 1
                if not (root / name).is_file():
                    return self.send_error(404)
                content = server.answer(name, server.asked[name], (root / name).read_bytes())
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                return self.wfile.write(content)

            def do_HEAD(self) -> None:
                self.send_error(405)

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server(written: Path) -> Iterator[Server]:
    with Server(written) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server
        server.shutdown()


@pytest.fixture(params=["http", "memory", "file"])
def url(request: pytest.FixtureRequest, written: Path) -> Iterator[str]:
    match request.param:
        case "http":
            yield request.getfixturevalue("server").url
        case "memory":
            memory = fsspec.filesystem("memory")
            memory.put(str(written), "/far-away", recursive=True)
            yield "memory://far-away"
            memory.rm("/far-away", recursive=True)
        case "file":
            yield written.as_uri()


def opened(url: str, cache: Path, *tasks: Task, gb: float = 1.0, **changes: object) -> list[ShardStream]:
    return open_streams(make_curriculum(cache, remote=url, cache_gb=gb, **changes).data, tasks, 32)


def size_of(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


@contextmanager
def peak_of(directory: Path) -> Iterator[list[int]]:
    """Bytes of a directory, looked at all the time."""
    seen, over = [], threading.Event()

    def look() -> None:
        directory.mkdir(exist_ok=True)
        while not over.is_set():
            with _locked(directory / "lock"):  # or a file that is renamed meanwhile may count twice
                seen.append(size_of(directory))
            time.sleep(0.001)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def least(root: Path, *tasks: Task) -> int:
    """Bytes of the smallest cache that is accepted for the data set in `root`."""
    streams = open_streams(make_curriculum(root).data, tasks, 32)
    windows = sum(mixture.window_bytes(found.sizes, found.shard_bytes) for found in streams)
    return windows + (root / DATASET_FILE).stat().st_size


def opened_here(root: Path) -> ShardStream:
    (found,) = open_streams(make_curriculum(root).data, [Task.T2I], 32)
    return found


def same(one: ShardStream, other: ShardStream, index: int) -> bool:
    a, b = one[index], other[index]
    return (a.id, a.prompt) == (b.id, b.prompt) and torch.equal(a.images, b.images) and torch.equal(a.target, b.target)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each shard was fetched by this process."""
    counts: Counter[str] = Counter()
    real = ShardCache._download

    def download(self: ShardCache, stream: Stream, name: str) -> bytes:
        counts[f"{stream.settings.name}/{name}"] += 1
        return real(self, stream, name)

    monkeypatch.setattr(ShardCache, "_download", download)
    return counts


# ------------------------------------------------------------------------------------------------------------- reading
@pytest.mark.parametrize("workers", [0, 3])
def test_batches_are_those_of_the_data_set_itself(
    written: Path, url: str, tmp_path: Path, encoder: PromptEncoder, fetched: Counter[str], workers: int
) -> None:
    """With the smallest cache, over several epochs, in which every shard gives way to others."""
    tasks = {"t2i": 0.6, "edit": 0.4}
    cache, limit = tmp_path / "cache", least(written, Task.T2I, Task.EDIT)
    assert limit < 0.6 * DataSet.at(written).streams[0].bytes
    changes = {"mixture": tasks, "steps": 40, "workers": workers}
    near = Loader(make_curriculum(written, **changes).stage_run("only"), encoder, 16)
    with peak_of(cache) as sizes:
        run = make_curriculum(cache, remote=url, cache_gb=limit / 1e9, **changes).stage_run("only")
        far = Loader(run, encoder, 16)
        for step in range(40):
            for a, b in zip(near.micro_batches(step), far.micro_batches(step), strict=True):
                assert torch.equal(a.sample_ids, b.sample_ids)
                assert torch.equal(a.target, b.target)
                assert torch.equal(a.images, b.images)
    near.close()
    far.close()
    assert len(sizes) > 20
    assert 0.5 * limit < max(sizes) <= limit
    # 24 steps of 8 of 53 samples are 3.6 epochs; an epoch needs a shard once, and at the edge of a window again.
    assert 14 + 6 <= len(fetched) == 20
    assert 40 <= fetched.total() <= 200


def test_what_is_cached_is_not_fetched_again(url: str, tmp_path: Path, fetched: Counter[str]) -> None:
    for _ in range(2):
        (found,) = opened(url, tmp_path, Task.T2I)
        assert {found[i].id for i in range(len(found))} == {r.id for r in STREAMS[stream(Task.T2I)]}
        assert set(fetched.values()) == {1}
        assert len(fetched) == 14
    assert sorted(p.name for p in tmp_path.iterdir()) == [DATASET_FILE, "lock", "shards"]
    assert not list(tmp_path.rglob("*.part"))


def test_another_version_of_the_data_set_finds_no_stale_shards(tmp_path: Path) -> None:
    for version in range(2):
        far = tmp_path / "far"
        shutil.rmtree(far, ignore_errors=True)
        records = shapes(Task.T2I, 20)[10 * version :][:10]
        handmade.write(far, {stream(Task.T2I): records}, partition=4)
        (found,) = opened(far.as_uri(), tmp_path / "cache", Task.T2I)
        assert [found[i].id for i in range(10)] == [r.id for r in records]


def test_the_least_recently_used_gives_way(server: Server, tmp_path: Path) -> None:
    (found,) = opened(server.url, tmp_path, Task.T2I)
    largest = max(found.shard_bytes)
    limit = int((tmp_path / DATASET_FILE).stat().st_size + 4.7 * largest)
    (found,) = opened(server.url, tmp_path, Task.T2I, gb=limit / 1e9)
    for shard in (0, 1, 2, 3, 0, 4, 5):
        assert found[4 * shard].id == STREAMS[stream(Task.T2I)][4 * shard].id
        time.sleep(0.02)
    before = server.asked.total()
    assert found[0].id  # used again before 4 and 5 came
    assert server.asked.total() == before
    assert found[4].id
    assert server.asked.total() > before


# ------------------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize("url", ["http://127.0.0.1:9/data", "nothing://data", "memory://nowhere", "file:///no/where"])
def test_a_url_that_cannot_be_read_is_named(tmp_path: Path, url: str) -> None:
    with pytest.raises(ShardError, match=url):
        opened(url, tmp_path, Task.T2I)


def test_a_connection_that_is_lost_is_named_and_never_skipped(server: Server, tmp_path: Path) -> None:
    (found,) = opened(server.url, tmp_path, Task.T2I, damaged="skip")
    server.shutdown()
    server.server_close()
    with pytest.raises(ShardError, match=rf"{server.url}/t2i/32/32x32/00000/shard.00000.mds cannot be read"):
        found[0]
    assert not found.skipped


def test_a_limit_below_what_is_read_at_a_time_is_refused_with_the_numbers(written: Path, tmp_path: Path) -> None:
    limit, both = least(written, Task.T2I), least(written, Task.T2I, Task.EDIT)
    opened(written.as_uri(), tmp_path, Task.T2I, gb=limit / 1e9)
    opened(written.as_uri(), tmp_path, Task.T2I, Task.EDIT, gb=both / 1e9)
    for tasks, bytes_ in (([Task.T2I], limit), ([Task.T2I, Task.EDIT], both)):
        with pytest.raises(ShardError, match=rf"data.cache_gb is {(bytes_ - 1) / 1e9:g}, .* together 0.001 GB: give"):
            opened(written.as_uri(), tmp_path, *tasks, gb=(bytes_ - 1) / 1e9)


def test_a_data_set_that_was_written_here_is_not_taken_for_a_cache(written: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(ShardError, match="contains a data set, so it cannot be the cache"):
        opened(written.as_uri(), tmp_path, Task.T2I)


def test_a_record_cannot_name_files_outside_the_cache(tmp_path: Path) -> None:
    far = tmp_path / "far"
    dataset = handmade.write(far, {stream(Task.T2I): shapes(Task.T2I, 3)})
    found = dataset.streams[0]
    files = {name: "../../stolen" for name in found.files}
    DataSet(streams=(found.model_copy(update={"files": files}),)).save(far / DATASET_FILE)
    with pytest.raises(ShardError, match=r"'\.\./\.\./stolen' where a SHA-256 is needed"):
        opened(far.as_uri(), tmp_path / "cache", Task.T2I)


# -------------------------------------------------------------------------------------------------------------- damage
def flipped(content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:]


@pytest.mark.parametrize("damage", [flipped, lambda c: c[:-1], lambda c: c + b"more", lambda c: b""])
@pytest.mark.parametrize("name", [SHARD, "t2i/32/32x32/index.json"])
def test_damage_on_the_way_is_fetched_once_more(
    written: Path, server: Server, tmp_path: Path, damage: Callable[[bytes], bytes], name: str
) -> None:
    server.answer = lambda path, time, content: damage(content) if path == name and time == 1 else content
    (far,), near = opened(server.url, tmp_path, Task.T2I), opened_here(written)
    assert all(same(far, near, i) for i in range(len(near)))
    assert server.asked[name] == 2


@pytest.mark.parametrize("damage", [flipped, lambda c: c + b"more"])
def test_damage_that_stays_is_refused_with_the_way_out(
    server: Server, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    server.answer = lambda path, time, content: damage(content) if path == SHARD else content
    (found,) = opened(server.url, tmp_path, Task.T2I)
    found[0]
    held = size_of(tmp_path)
    remedy = f"delete {server.url}/t2i/32/32x32/00003, {server.url}/ledger/00003.json, {server.url}/dataset.json"
    with pytest.raises(ShardError, match=rf"{server.url}/{SHARD} is damaged .*{remedy}"):
        found[13]
    assert size_of(tmp_path) == held
    server.answer = lambda path, time, content: damage(content)
    with pytest.raises(ShardError):
        opened(server.url, tmp_path, Task.T2I)


@pytest.mark.filterwarnings("error")
def test_a_shard_that_is_damaged_or_missing_is_skipped_once_and_for_all(server: Server, tmp_path: Path) -> None:
    server.answer = lambda path, time, content: flipped(content) if path == SHARD else content
    (found,) = opened(server.url, tmp_path, Task.T2I, damaged="skip")
    with pytest.warns(UserWarning, match=f"{SHARD} is damaged"):
        assert found[12].id == STREAMS[stream(Task.T2I)][16].id
    assert found[13].id == STREAMS[stream(Task.T2I)][16].id
    assert found.skipped == {(SHARD, 0): 1, (SHARD, 1): 1}
    assert server.asked[SHARD] == 2


def test_a_shard_that_is_not_there_is_named(written: Path, tmp_path: Path) -> None:
    far = Path(shutil.copytree(written, tmp_path / "far"))
    (found,) = opened(far.as_uri(), tmp_path / "cache", Task.T2I)
    (far / SHARD).unlink()
    with pytest.raises(ShardError, match=f"{SHARD} is missing"):
        found[12]


def test_damage_in_the_cache_is_noticed_and_the_file_named(written: Path, tmp_path: Path) -> None:
    (found,) = opened(written.as_uri(), tmp_path, Task.T2I)
    found[0]
    (cached,) = (tmp_path / "shards").iterdir()
    handmade.rewrite(cached, lambda content: content.__setitem__(-1, content[-1] ^ 1))
    with pytest.raises(ShardError, match=rf"damaged in record 3 .* to have it fetched anew, delete {cached}"):
        found[3]
    cached.unlink()
    assert found[3].id == STREAMS[stream(Task.T2I)][3].id


# ----------------------------------------------------------------------------------------------------- several readers
def read_all(url: str, cache: Path, limit: float, seed: int, near: Path) -> None:
    """A process of its own that reads everything in an order of its own, in four threads; exits with 1 on any error."""
    (far,), here = opened(url, cache, Task.T2I, gb=limit), opened_here(near)
    orders = [np.random.default_rng([seed, thread]).permutation(len(far)) for thread in range(4)]
    results: list[bool] = []

    def work(order: np.ndarray) -> None:
        results.append(all(same(far, here, int(i)) for i in order))

    threads = [threading.Thread(target=work, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os._exit(0 if results == [True] * 4 else 1)


def test_processes_and_threads_share_the_smallest_cache(written: Path, tmp_path: Path) -> None:
    cache, limit = tmp_path / "cache", least(written, Task.T2I)
    readers = [
        fork.Process(target=read_all, args=(written.as_uri(), cache, limit / 1e9, seed, written)) for seed in range(4)
    ]
    for reader in readers:  # first: a process made while a thread of this one holds a lock would hold it too
        reader.start()
    with peak_of(cache) as sizes:
        for reader in readers:
            reader.join(120)
    assert [reader.exitcode for reader in readers] == [0] * 4
    assert len(sizes) > 20
    assert max(sizes) <= limit
    assert not list(cache.rglob("*.part"))


def test_a_shard_that_all_want_is_fetched_once(server: Server, tmp_path: Path) -> None:
    def slowly(path: str, time_asked: int, content: bytes) -> bytes:
        if path.endswith(".mds"):
            time.sleep(0.3)
        return content

    server.answer = slowly
    streams = [opened(server.url, tmp_path, Task.T2I)[0] for _ in range(3)]
    threads = [threading.Thread(target=found.__getitem__, args=(i,)) for found in streams for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.asked["t2i/32/32x32/00000/shard.00000.mds"] == 1


def hang_in_a_fetch(url: str, cache: Path, limit: float, ready: Path) -> None:
    real = ShardCache._download

    def download(self: ShardCache, stream: Stream, name: str) -> bytes:
        real(self, stream, name)
        ready.touch()
        time.sleep(1000)

    ShardCache._download = download
    opened(url, cache, Task.T2I, gb=limit)[0][12]


def hang_in_a_read(url: str, cache: Path, limit: float, ready: Path) -> None:
    (found,) = opened(url, cache, Task.T2I, gb=limit)
    name, shard = list(found._shards.items())[3]
    with found._files.available(found._stream, name, shard.bytes):
        ready.touch()
        time.sleep(1000)


@pytest.mark.parametrize("hang", [hang_in_a_fetch, hang_in_a_read])
def test_what_a_killed_process_held_is_free(written: Path, tmp_path: Path, hang: Callable[..., None]) -> None:
    url, cache, ready = written.as_uri(), tmp_path / "cache", tmp_path / "ready"
    limit = least(written, Task.T2I) / 1e9
    victim = fork.Process(target=partial(hang, url, cache, limit, ready))
    victim.start()
    while not ready.exists():
        assert victim.is_alive()
        time.sleep(0.01)
    (far,), near = opened(url, cache, Task.T2I, gb=limit), opened_here(written)
    others = [i for i in range(len(near)) if i not in range(12, 16)]
    # While it lives, all goes on beside it, and what it holds stays.
    assert all(same(far, near, i) for i in others)
    (held,) = (cache / "shards").glob(f"{list(far._shards.values())[3].path.name}*")
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert same(far, near, 12)
    assert all(same(far, near, i) for i in others)
    assert size_of(cache) <= limit * 1e9
    assert not held.exists()
