"""What the launcher must know of a cluster: one small file for each, in `configs/cluster/`."""

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from wemmu.config.base import Config, LocalPath, Positive


def _time_limit(time: object) -> object:
    # YAML reads an unquoted 24:00:00 as a number in base 60, which no minutes are meant by.
    if not isinstance(time, str) or not re.fullmatch(r"\d+|(\d+-)?\d{1,2}(:\d\d){1,2}", time):
        raise ValueError("no time limit; valid, in quotes: MINUTES, HH:MM:SS, D-HH:MM:SS")
    return time


TimeLimit = Annotated[str, BeforeValidator(_time_limit)]


# Without the number of them.
Gres = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(:[A-Za-z_][\w.\-]*)?$")]


class Container(Config):
    """An image in which all jobs but the data job run, for clusters with pyxis: `srun --container-image`."""

    image: str
    # The image's own, with the dependencies.
    python: str = "python"
    # HOST:CONTAINER[:FLAGS] each; the working directory is added where none holds it.
    mounts: tuple[str, ...] = ()


class Kind(Config):
    """Resources of one job that is no training: on one node unless it says otherwise."""

    time: TimeLimit = "04:00:00"
    nodes: Positive = 1
    cpus: Positive | None = None
    gpus: Annotated[int, Field(ge=0)] = 0
    # What they are called in --gres, as gpu:a100; else as `Cluster.gres`.
    gres: Gres | None = None
    # Of each node, as 64G.
    memory: str | None = None
    # One of its own has no QOS or constraint but those named here.
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None


class Cluster(Config):
    """A cluster as its users see it; what is None is left to the site's own default."""

    name: str
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    # Ranks of a training job on one node; with `gpus` each has one of its own.
    ranks_per_node: Positive = 8
    gpus: bool = True
    # What the site calls them in --gres, as gpu:a100.
    gres: Gres = "gpu"
    # Of each node of a training job, as 500G; 0 is all of it.
    memory: str | None = None
    reservation: str | None = None
    mail_user: str | None = None
    mail_type: tuple[str, ...] = ("END", "FAIL")
    # Kind of them, for the estimates of the plan; one that `python -m wemmu.plan` knows.
    gpu: Literal["a100", "h100", "h200", "b200"] | None = None
    # Of each node, for its ranks and their readers.
    cpus_per_node: Positive | None = None
    exclusive: bool = True
    # Limit of one training job; what is not finished by then saves, and goes on as the same job.
    time: TimeLimit = "24:00:00"
    # Limits of stages that have another one, by their names.
    times: Mapping[str, TimeLimit] = Field(default_factory=dict)
    # Seconds before that limit at which the ranks are told to save.
    warn_before: Annotated[int, Field(ge=30)] = 600
    data: Kind = Kind(time="24:00:00", nodes=4)
    evaluation: Kind = Kind(gpus=1)
    export: Kind = Kind()
    # `module load` for each, and a file that is sourced then, before anything of ours runs.
    modules: tuple[str, ...] = ()
    prolog: LocalPath | None = None
    container: Container | None = None
    # Further options of sbatch for every job, as `--licenses=NAME`; those of GPUs and memory only for jobs with a GPU.
    options: tuple[Annotated[str, Field(pattern=r"^--[a-z][a-z\-]*(=.*)?$")], ...] = ()

    def nodes(self, ranks: int) -> int:
        """Nodes that a training job of `ranks` takes.

        Raises:
            ValueError: if they do not fill whole nodes.
        """
        if ranks > self.ranks_per_node and ranks % self.ranks_per_node:
            raise ValueError(
                f"parallel.ranks is {ranks}, which does not fill nodes of {self.ranks_per_node} ranks (cluster "
                f"{self.name}); valid choices: up to {self.ranks_per_node}, or a multiple of it"
            )
        return max(1, ranks // self.ranks_per_node)
