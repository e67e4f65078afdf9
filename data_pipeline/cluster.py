"""Runs the work in this process, on a new local Ray cluster, or on a running Ray cluster."""

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
from data_pipeline.records import SourcePartition, WorkerError
from wemmu.command_line import FAILED
from wemmu.config import ConfigError
from wemmu.config.shards import ShardError

Result = TypeVar("Result")
# Name of a method of a started model -> the method, as a function that workers can call.
Methods = Callable[[str], Callable[[Any], Any]]
# Ray tasks in flight per CPU: enough to keep it busy, few enough to bound the memory of their arguments.
AHEAD = 4
# How often Ray repeats the part of a worker that died.
RETRIES = 3


class Workers:
    """This process, for small data and for debugging a source."""

    def run(self, function: Callable[..., Result], arguments: Iterable[tuple[Any, ...]]) -> Iterator[Result]:
        """Call `function` with every tuple of arguments; yield results as they finish, in any order."""
        return (function(*args) for args in arguments)

    def services(self, job: Job) -> Services:
        """Start the job's models; return them as functions for `run`."""
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
    """Use `number` local processes (None: one per core; 0: this process), or the cluster at `address`."""
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
        # Ray replaces a worker that dies (out of memory, a lost node) and repeats its part.
        remote = self._ray.remote(function).options(max_retries=RETRIES)
        running: dict[Any, SourcePartition] = {}
        for args in arguments:
            if len(running) >= self._window:
                yield self._next(running)
            running[remote.remote(*args)] = next(arg for arg in args if isinstance(arg, SourcePartition))
        while running:
            yield self._next(running)

    def _next(self, running: dict[Any, SourcePartition]) -> Any:
        """Return a result and forget its task; raise self-explanatory errors without the worker's traceback."""
        done = self._ray.wait(list(running))[0][0]
        part, errors = running.pop(done), self._ray.exceptions
        try:
            return self._ray.get(done)
        except errors.RayError as error:
            cause = error.cause if isinstance(error, errors.RayTaskError) else error
            if isinstance(cause, OSError | ConfigError | ShardError | WorkerError):
                raise cause from None
            if isinstance(cause, errors.RayError) and not isinstance(cause, errors.RayTaskError):
                raise WorkerError(
                    f"a Ray process ended again and again at {part.source}/{part.name}: {str(cause).strip()} "
                    "What is finished stays; run the same command again, with fewer --workers if the memory was short"
                ) from None
            raise

    def _start(self, service: type, *arguments: object) -> Methods:
        """Return the number of actors: one per GPU of the cluster, or one."""
        remote = self._ray.remote(service).options(num_cpus=0, num_gpus=1 if self._gpus else 0)
        return partial(_Remote, [remote.remote(*arguments) for _ in range(max(1, self._gpus))])


class RayError(RuntimeError):
    """There is no cluster to work on; another attempt may find one."""

    exit_code = FAILED


@contextmanager
def ray_cluster(address: str | None, workers: int | None) -> Iterator[ModuleType]:
    """Connect to Ray. Without `address`, start a local cluster of `workers` CPUs (default: all).

    It has no dashboard and no usage statistics and listens on loopback only.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address is None:
        # Ray reads this at import. Our own token keeps other users of the node out of Ray's ports, and none lands in
        # the home directory.
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
                # Only images for a model pass through the store; 75 MB is Ray's minimum.
                "object_store_memory": 200 * 2**20,
                "_temp_dir": stack.enter_context(scratch),
            }
        stack.callback(ray.shutdown)
        try:
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.WARNING, **options)
        except Exception as error:  # Ray has no class of its own for it.
            where = f"at {address} does not answer" if address else "did not start on this machine"
            remedy = "correct --ray" if address else "repeat the command when the machine is less busy"
            raise RayError(f"Ray {where} ({error}); {remedy}") from error
        yield ray


def _sweep() -> None:
    """Remove folders of this user's killed runs."""
    for folder in Path("/tmp").glob("ray*-*"):
        pid = folder.name.removeprefix("ray").partition("-")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists() and folder.stat().st_uid == os.getuid():
            shutil.rmtree(folder, ignore_errors=True)


class _Remote:
    """Return a method of several actors as a plain function; calls go to the actors in turn."""

    def __init__(self, actors: list[Any], method: str):
        self._actors, self._method, self._calls = actors, method, 0

    def __call__(self, argument: Any) -> Any:
        import ray

        actor = self._actors[(os.getpid() + self._calls) % len(self._actors)]
        self._calls += 1
        return ray.get(getattr(actor, self._method).remote(argument))
