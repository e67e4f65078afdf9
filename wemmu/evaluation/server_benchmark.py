"""Shared code of benchmarks with a server as judge; each adds `requests`, `verdict` and `headline`."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wemmu.config.benchmarks import ServerOptions
from wemmu.evaluation.benchmark import Benchmark, Judged
from wemmu.evaluation.server_judge import ServerJudge


class ServerBenchmark(Benchmark):
    """A benchmark whose judge is behind a server. `server` answers questions; `read` are the published files."""

    def __init__(self, options: ServerOptions, read: Sequence[Path]) -> None:
        self.server = ServerJudge(options, options.cache)
        self._read = read

    @abstractmethod
    def verdict(self, judged: Judged) -> Mapping[str, float | None]:
        """Return measure -> value of one image; several threads call it."""
        ...

    def files(self) -> Mapping[str, Path]:
        return {file.name: file for file in self._read}

    def judges(self) -> Mapping[str, Any]:
        return {"vlm": self.server.identity()}

    def judge(self, images: Iterable[Judged]) -> Iterator[Mapping[str, float | None]]:
        yield from self.server.each(self.verdict, images)
        if not self.server.understood:
            raise self.server.useless("has given no verdict")
