"""The config of WeMMU: noisy query tokens that bridge a frozen VLM and a DiT."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from wemmu.config.base import Config, Positive
from wemmu.config.recipe import RecipeConfig
from wemmu.config.stage import Rung, Stage
from wemmu.config.task import GENERATION_TASKS, Task


class Queries(Config):
    """Design of the query tokens.

    noisy: N(0, std^2), drawn anew at every step, as many as the VLM has tokens for the picture (the paper).
    learnable_fixed: `number` trained vectors whatever the resolution (MetaQueries).
    learnable_dynamic: a trained table, cropped from the centre to the current grid.
    """

    design: Literal["noisy", "learnable_fixed", "learnable_dynamic"] = "noisy"
    # A learnable scale stayed at 1.0 over 80M samples in the paper, hence plain N(0, I).
    std: Annotated[float, Field(gt=0)] = 1.0
    number: Positive = 64


class Bridge(Config):
    """What stands between the VLM and the DiT."""

    queries: Queries = Queries()
    vae_branch: bool = True
    # Side of the position table in tokens; it bounds the resolution. 64 tokens are 1792 px of Qwen2.5-VL.
    position_table: Positive = 64
    # OPEN in the paper. With the usual 0.02 the table is invisible beside the pathway's outputs for thousands of
    # steps, and noisy queries have no other strong mark of their column; see docs/log.md.
    position_std: Annotated[float, Field(ge=0)] = 1.0


class WeMMU(RecipeConfig):
    """A bridge, trained alone or with the DiT, makes images from what a frozen VLM understood."""

    kind: Literal["wemmu"] = "wemmu"
    bridge: Bridge = Bridge()

    modules: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vae_branch": ("bridge.vae_branch.",),
        "pathway": ("bridge.pathway.",),
        "position_mlp": ("bridge.position_mlp.",),
        "queries": ("bridge.queries.",),
        "dit": ("dit.",),
    }
    backbones: ClassVar[tuple[str, ...]] = ("vlm", "vae", "dit")
    tasks: ClassVar[tuple[Task, ...]] = GENERATION_TASKS
    objectives: ClassVar[tuple[str, ...]] = ("flow", "contrastive")
    engines: ClassVar[tuple[str, ...]] = ("single", "zero3", "hybrid")
    draws: ClassVar[bool] = True

    def check_stage(self, stage: Stage | Rung) -> None:
        """Refuse a stage that trains what this bridge lacks, or leaves untrained what only training can make."""
        design = self.bridge.queries.design
        if "queries" in stage.trains and design == "noisy":
            raise ValueError(f"stage {stage.name} trains the queries, but noisy queries have no parameters")
        if "queries" not in stage.trains and design != "noisy":
            raise ValueError(f"stage {stage.name} must train the queries of design {design}")
        if "vae_branch" in stage.trains and not self.bridge.vae_branch:
            raise ValueError(f"stage {stage.name} trains the VAE branch, but recipe.bridge.vae_branch is off")
        if "dit" in stage.trains and stage.optimizer.dit_lr is None:
            raise ValueError(f"stage {stage.name} trains the DiT, so optimizer.dit_lr is needed")
        if stage.objective.kind == "contrastive" and stage.global_batch < 2:
            raise ValueError(f"stage {stage.name}: the contrastive objective needs another sample in the batch")
