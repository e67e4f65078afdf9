"""Where the work is done: in this process, on a Ray cluster made for it on this machine, or on one that is there."""

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from data_pipeline.chain import Services
from data_pipeline.plan import Job
from wemmu.config import ConfigError
from wemmu.config.shards import ShardError

Result = TypeVar("Result")
# Name of a method of a model that was started -> the method, as a function that can be handed to workers.
Methods = Callable[[str], Callable[[Any], Any]]
# Tasks handed to Ray at a time, for each CPU: enough to keep it busy, few enough that their arguments stay small.
AHEAD = 4


class Workers:
    """This process, for small data and for finding out what goes wrong in a source."""

    def run(self, function: Callable[..., Result], arguments: Iterable[tuple[Any, ...]]) -> Iterator[Result]:
        """`function` of every tuple of arguments; the results come as they are ready, in any order."""
        return (function(*args) for args in arguments)

    def services(self, job: Job) -> Services:
        """The models that the job asks for, as functions that can be handed to `run`."""
        prepare, services = job.prepare, Services()
        if prepare.caption is None and prepare.latents is None:
            return services
        # Imports torch and the models.
        from data_pipeline.services import CaptionService, LatentService

        if prepare.caption is not None:
            services = replace(services, caption=self._start(CaptionService, prepare.caption)("caption"))
        if prepare.latents is not None:
            encoder = self._start(LatentService, job.vae, prepare.latents.dtype)
            services = replace(services, encode=encoder("encode"), latents=encoder("settings"))
        return services

    def _start(self, service: type, *arguments: object) -> Methods:
        return partial(getattr, service(*arguments))


@contextmanager
def workers(number: int | None, address: str | None) -> Iterator[Workers]:
    """`number` processes on this machine (None: one a core; 0: this process), or those of the cluster at `address`."""
    if number == 0:
        yield Workers()
    else:
        with ray_cluster(address, number) as ray:
            yield OnRay(ray)


class OnRay(Workers):
    def __init__(self, ray: ModuleType):
        self._ray = ray
        resources = ray.cluster_resources()
        self._window = AHEAD * max(1, int(resources.get("CPU", 1)))
        self._gpus = int(resources.get("GPU", 0))

    def run(self, function: Callable[..., Result], arguments: Iterable[tuple[Any, ...]]) -> Iterator[Result]:
        # A worker that dies (out of memory, a lost node) is replaced, and its part done again.
        remote = self._ray.remote(function).options(max_retries=3)
        running: list[Any] = []
        for args in arguments:
            if len(running) >= self._window:
                done, running = self._ray.wait(running)
                yield from self._results(done)
            running.append(remote.remote(*args))
        while running:
            done, running = self._ray.wait(running)
            yield from self._results(done)

    def _results(self, done: list[Any]) -> list[Any]:
        """Errors that say by themselves what is wrong come as they were raised, without the worker's traceback."""
        try:
            return self._ray.get(done)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, OSError | ConfigError | ShardError):
                raise error.cause from None
            raise

    def _start(self, service: type, *arguments: object) -> Methods:
        """One for each GPU of the cluster, or one."""
        remote = self._ray.remote(service).options(num_cpus=0, num_gpus=1 if self._gpus else 0)
        return partial(_Remote, [remote.remote(*arguments) for _ in range(max(1, self._gpus))])


@contextmanager
def ray_cluster(address: str | None, workers: int | None) -> Iterator[ModuleType]:
    """`ray`, connected. Without `address` a cluster of `workers` CPUs (default: all) on this machine is made for it.

    No dashboard and no usage statistics; it listens on loopback only.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address is None:
        # Read when Ray is imported. A token of our own keeps other users of the node out of the ports that Ray opens,
        # without leaving one in the home directory.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray

    with ExitStack() as stack:
        options: dict[str, Any] = {}
        if address is None:
            _sweep()
            # Under /tmp whatever TMPDIR says: Ray puts sockets there, whose paths may not have over 107 characters.
            scratch = tempfile.TemporaryDirectory(prefix=f"ray{os.getpid()}-", dir="/tmp", ignore_cleanup_errors=True)
            options = {
                "num_cpus": workers or len(os.sched_getaffinity(0)),
                "_node_ip_address": "127.0.0.1",
                "include_dashboard": False,
                # Images travel through the store only on their way to a model; the least Ray accepts is 75 MB.
                "object_store_memory": 200 * 2**20,
                "_temp_dir": stack.enter_context(scratch),
            }
        stack.callback(ray.shutdown)
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.WARNING, **options)
        yield ray


def _sweep() -> None:
    """Remove the folders that killed runs of this user left."""
    for folder in Path("/tmp").glob("ray*-*"):
        pid = folder.name.removeprefix("ray").partition("-")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists() and folder.stat().st_uid == os.getuid():
            shutil.rmtree(folder, ignore_errors=True)


class _Remote:
    """A method of some actors as a plain function; each call goes to the next of them."""

    def __init__(self, actors: list[Any], method: str):
        self._actors, self._method, self._calls = actors, method, 0

    def __call__(self, argument: Any) -> Any:
        import ray

        actor = self._actors[(os.getpid() + self._calls) % len(self._actors)]
        self._calls += 1
        return ray.get(getattr(actor, self._method).remote(argument))
