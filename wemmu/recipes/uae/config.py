"""The config of UAE (arXiv 2509.09666): a VLM whose captions are rewarded by what a generator reconstructs from them.

The default is the paper's fifth version: only the language model learns, from rewards. docs/uae.md says where the paper
and the released code differ or are silent.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from wemmu.config.base import Config, LocalPath, Positive, Seed
from wemmu.config.objectives import UnifiedGRPO
from wemmu.config.recipe import RecipeConfig
from wemmu.config.stage import ResolutionStep, Stage
from wemmu.config.task import Task
from wemmu.recipes.wemmu.config import Bridge


class Generator(Config):
    """The frozen decoder, a WeMMU model, and how it renders captions.

    weights: a checkpoint, shipped weights or an exported bridge, as `start` of a stage takes; what it does not hold are
    the backbones' own.
    """

    weights: LocalPath
    bridge: Bridge = Bridge()
    # Timestep shift at the stage's resolution, as the generator was trained with.
    shift: Annotated[float, Field(gt=0)] = 3.0
    # OPEN in the paper. Few steps are enough for a reward; inference takes more.
    steps: Positive = 20
    guidance: float = 4.0
    # Images rendered at a time.
    micro_batch: Positive = 16
    # Of the noise, one for each image, which its captions share.
    seed: Seed = 0
    # Keep generator and encoders in host memory except while they compute a reward.
    offload: bool = False


class Reward(Config):
    """R = cos(f(x), f(x~)) of the image x and its reconstruction x~, by a frozen encoder f.

    encoder: directory of a published image encoder, or `pixels`: the image itself, scaled to 16 x 16 px and centred.
    held_out: further encoders whose cosines are recorded and reward nothing.
    control: experiments that must not learn. `constant` rewards every caption alike; `deranged` compares with the image
    of the next sample of the micro-batch.
    """

    encoder: Literal["pixels"] | LocalPath
    held_out: dict[Annotated[str, Field(pattern=r"^[a-z0-9_\-]+$")], Literal["pixels"] | LocalPath] = Field(
        default_factory=dict
    )
    control: Literal["none", "constant", "deranged"] = "none"


class UAE(RecipeConfig):
    """Image -> caption -> image: the caption policy learns, the rest is frozen.

    condition: `reencode` gives the generator the caption alone, as text-to-image inference does; `in_context` gives it
    the states of a caption that has seen the image, as the released cold start does, so the image can bypass the words.
    cond_encoder: whose keys and values condition the generator. `reference`: the VLM that it was trained with, so that
    the reward does not move with the policy. `policy`: the VLM that learns.
    """

    kind: Literal["uae"] = "uae"
    # What the VLM is asked of every image. OPEN in the paper, which prints no length request.
    instruction: str = "Describe this image in detail."
    # Tokens of a caption, its end included. OPEN in the paper; the length of the released inference.
    max_length: Positive = 512
    condition: Literal["reencode", "in_context"] = "reencode"
    cond_encoder: Literal["reference", "policy"] = "reference"
    generator: Generator
    reward: Reward

    modules: ClassVar[Mapping[str, tuple[str, ...]]] = {"llm": ("vlm.model.language_model.", "vlm.lm_head.")}
    backbones: ClassVar[tuple[str, ...]] = ("vlm", "vae", "dit")
    tasks: ClassVar[tuple[Task, ...]] = (Task.CAPTION, Task.UNDERSTANDING)
    objectives: ClassVar[tuple[str, ...]] = ("caption", "unified_grpo")
    engines: ClassVar[tuple[str, ...]] = ("single", "zero3")
    draws: ClassVar[bool] = False
    adaptable: ClassVar[tuple[str, ...]] = ("llm",)
    does: ClassVar[str] = "captions an image, draws it again from the caption alone, and answers questions"

    @property
    def asks_for_captions(self) -> str:
        return self.instruction

    def check_stage(self, stage: Stage | ResolutionStep) -> None:
        """Refuse what needs a loss of generation, questions that have no reward, and a rollout that is cut."""
        if stage.has_plateau:
            raise ValueError(
                f"stage {stage.name}: next_resolution.plateau needs the validation loss, which exists for generation; "
                "the recipe uae ends a resolution by samples"
            )
        if not isinstance(stage.objective, UnifiedGRPO):
            return
        if Task.UNDERSTANDING in stage.mixture:
            raise ValueError(f"stage {stage.name}: unified_grpo rewards captions; valid tasks: caption")
        if stage.steps % stage.objective.updates:
            raise ValueError(
                f"stage {stage.name}: its {stage.steps} steps are no multiple of objective.updates "
                f"{stage.objective.updates}, the steps of one rollout"
            )
