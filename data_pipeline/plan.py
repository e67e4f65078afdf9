"""Curriculum -> the streams that its stages read."""

from data_pipeline.sources import SOURCES
from wemmu.config import ConfigError, Curriculum
from wemmu.config.shards import StreamSettings

# Records in one partition, the unit of parallel work and of what a killed run has to do again: about a second of work.
PARTITION = 2000


def plan(curriculum: Curriculum, partition: int = PARTITION) -> tuple[StreamSettings, ...]:
    """One stream for every task that some stage mixes, at every resolution at which some stage uses it.

    Raises:
        ConfigError: if the curriculum prepares no data, or none for a task that a stage mixes.
    """
    prepare = curriculum.data.prepare
    if prepare is None:
        raise ConfigError(
            f"the curriculum {curriculum.name} has no data.prepare, so there is nothing to write; its stages read "
            f"{curriculum.data.shards} as it is"
        )
    source = SOURCES[prepare.source]
    streams: dict[str, StreamSettings] = {}
    for stage in curriculum.stages:
        for task in stage.mixture:
            if task not in prepare.samples:
                raise ConfigError(
                    f"stage {stage.name} mixes {task}, but data.prepare.samples counts only: "
                    f"{', '.join(prepare.samples)}"
                )
            for height, width in source.sizes(stage.resolution):
                settings = StreamSettings(
                    source=prepare.source,
                    source_version=source.version,
                    seed=prepare.seed,
                    task=task,
                    resolution=stage.resolution,
                    height=height,
                    width=width,
                    samples=prepare.samples[task],
                    partition=partition,
                )
                streams[settings.name] = settings
    return tuple(streams.values())
