"""The description of a cluster: one small file each, in `configs/cluster/`."""

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from wemmu.config.base import Config, LocalPath, Positive


def _time_limit(time: object) -> object:
    # YAML reads an unquoted 24:00:00 as a number in base 60.
    if not isinstance(time, str) or not re.fullmatch(r"\d+|(\d+-)?\d{1,2}(:\d\d){1,2}", time):
        raise ValueError("not a time limit; valid, in quotes: MINUTES, HH:MM:SS, D-HH:MM:SS")
    return time


TimeLimit = Annotated[str, BeforeValidator(_time_limit)]


def _one_word(value: str) -> str:
    if value.split() != [value]:
        raise ValueError("must be one word; several names are separated by commas without spaces, as gpu,long")
    return value


# What sbatch takes as one word, and would refuse or misread otherwise.
Name = Annotated[str, AfterValidator(_one_word)]
# Without a number.
Gres = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(:[A-Za-z_][\w.\-]*)?$")]


class Container(Config):
    """An image in which all jobs but the data job run, for clusters with pyxis: `srun --container-image`."""

    image: str
    # Python of the image, with the dependencies.
    python: str = "python"
    # HOST:CONTAINER[:FLAGS] each; the launcher adds the working directory if no mount holds it.
    mounts: tuple[str, ...] = ()


class JobResources(Config):
    """Resources of a job that does not train; one node by default."""

    time: TimeLimit = "04:00:00"
    nodes: Positive = 1
    cpus: Positive | None = None
    gpus: Annotated[int, Field(ge=0)] = 0
    # Name of its GPUs in --gres, as gpu:a100; default: `Cluster.gres`.
    gres: Gres | None = None
    # Per node, as 64G.
    memory: Name | None = None
    # A job with its own partition uses only the QOS and constraint named here.
    partition: Name | None = None
    account: Name | None = None
    qos: Name | None = None
    constraint: Name | None = None


class Cluster(Config):
    """A cluster as its users see it; None means the site's default."""

    name: str
    partition: Name | None = None
    account: Name | None = None
    qos: Name | None = None
    constraint: Name | None = None
    # Ranks of a training job per node; with `gpus` each rank has one GPU.
    ranks_per_node: Positive = 8
    gpus: bool = True
    # The site's name of GPUs in --gres, as gpu:a100.
    gres: Gres = "gpu"
    # Per node of a training job, as 500G; 0 is all of it.
    memory: Name | None = None
    reservation: Name | None = None
    mail_user: Name | None = None
    mail_type: tuple[Name, ...] = ("END", "FAIL")
    # Kind of GPU for the plan's estimates; one that `wemmu plan` knows.
    gpu: Literal["a100", "h100", "h200", "b200"] | None = None
    # Per node, for its ranks and their loader threads.
    cpus_per_node: Positive | None = None
    exclusive: bool = True
    # Time limit of a training job. An unfinished job saves before it and resumes as the same job.
    time: TimeLimit = "24:00:00"
    # Other limits, by the name of the stage.
    times: Mapping[str, TimeLimit] = Field(default_factory=dict)
    # Seconds before that limit at which the ranks save.
    warn_before: Annotated[int, Field(ge=30)] = 600
    data: JobResources = JobResources(time="24:00:00", nodes=4)
    evaluation: JobResources = JobResources(gpus=1)
    export: JobResources = JobResources()
    # The job runs `module load` for each, then sources the prolog.
    modules: tuple[Name, ...] = ()
    prolog: LocalPath | None = None
    container: Container | None = None
    # More sbatch options for every job, as `--licenses=NAME`; options for GPUs and memory only go to jobs with a GPU.
    options: tuple[Annotated[str, Field(pattern=r"^--[a-z][a-z\-]*(=.*)?$")], ...] = ()

    def nodes(self, ranks: int) -> int:
        """Return the number of nodes for a training job of `ranks`.

        Raises:
            ValueError: if the ranks do not fill whole nodes.
        """
        if ranks > self.ranks_per_node and ranks % self.ranks_per_node:
            raise ValueError(
                f"parallel.ranks is {ranks}, which does not fill nodes of {self.ranks_per_node} ranks (cluster "
                f"{self.name}); valid choices: up to {self.ranks_per_node}, or a multiple of it"
            )
        return max(1, ranks // self.ranks_per_node)
