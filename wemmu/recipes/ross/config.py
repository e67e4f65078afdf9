"""The config of ROSS (arXiv 2410.09575): a VLM with a head that reconstructs images from the language model's states.

Where the released code and the paper differ or are silent, the default is argued beside the field.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from wemmu.config.base import Config, Positive
from wemmu.config.objectives import Metric
from wemmu.config.recipe import RecipeConfig
from wemmu.config.stage import ResolutionStep, Stage
from wemmu.config.task import UNDERSTANDING_TASKS, Task


class Denoiser(Config):
    """A small transformer that predicts the noise in the target (ROSS^D): z_t = sqrt(abar_t) z_0 + sqrt(1-abar_t) eps.

    conditioning: `adaln_zero` modulates every layer by states and time, each token by its own state (the released
    code); `add` sums tokens, states and time before every layer (the paper's figure), and norms states with weights of
    its own.
    """

    kind: Literal["denoiser"] = "denoiser"
    conditioning: Literal["adaln_zero", "add"] = "adaln_zero"
    depth: Positive = 3
    width: Positive = 1024
    heads: Positive = 16
    # Steps of the cosine schedule; the head is trained at all of them.
    timesteps: Positive = 1000
    # Draws of (t, eps) for each image and step, which share the states and the target.
    repeats: Positive = 4

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"recipe.head.width {self.width} must be a multiple of 4 and of its {self.heads} heads")
        return self


class Regressor(Config):
    """An MLP that predicts the target itself (ROSS^R)."""

    kind: Literal["regressor"] = "regressor"
    depth: Positive = 2
    metric: Metric = "mse"


class Ross(RecipeConfig):
    """A VLM learns to answer and, with a head, to reconstruct the image.

    target: `latents` of the frozen autoencoder, or `pixels` of each token's patch in [-1, 1]. layer: the states after
    this many layers of the language model (0: its input), without the norm; `last`: after all layers and the final
    norm, as the language-model head reads them.
    """

    kind: Literal["ross"] = "ross"
    target: Literal["latents", "pixels"] = "latents"
    layer: Annotated[int, Field(ge=0)] | Literal["last"] = "last"
    head: Annotated[Denoiser | Regressor, Field(discriminator="kind")] = Denoiser()

    modules: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "projector": ("vlm.model.visual.merger.", "vlm.model.visual.deepstack_merger_list."),
        "llm": ("vlm.model.language_model.", "vlm.lm_head."),
        "head": ("head.",),
    }
    backbones: ClassVar[tuple[str, ...]] = ("vlm", "vae")
    tasks: ClassVar[tuple[Task, ...]] = UNDERSTANDING_TASKS
    objectives: ClassVar[tuple[str, ...]] = ("reconstructive",)
    engines: ClassVar[tuple[str, ...]] = ("single", "zero3")
    draws: ClassVar[bool] = False

    def check_stage(self, stage: Stage | ResolutionStep) -> None:
        """Refuse resolutions that end by a plateau of the validation loss, which is a loss of generation."""
        if stage.has_plateau:
            raise ValueError(
                f"stage {stage.name}: next_resolution.plateau needs the validation loss, which exists for generation; "
                "the recipe ross ends a resolution by samples"
            )
