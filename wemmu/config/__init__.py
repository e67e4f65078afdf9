"""The config of a run: typed, validated, and free of torch, so a login node can reject a bad run."""

from wemmu.config.base import ConfigError
from wemmu.config.load import dump, load, load_curriculum, load_stage, load_stages
from wemmu.config.schema import Curriculum, StageRun
from wemmu.config.stage import ResolutionStep, Stage
from wemmu.config.task import Task

__all__ = [
    "ConfigError",
    "Curriculum",
    "ResolutionStep",
    "Stage",
    "StageRun",
    "Task",
    "dump",
    "load",
    "load_curriculum",
    "load_stage",
    "load_stages",
]
