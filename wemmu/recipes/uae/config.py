"""The config of UAE (arXiv 2509.09666): a VLM whose captions are rewarded by what a generator reconstructs from them.

The default is the paper's fifth version: only the language model learns, from rewards. docs/uae.md says where the paper
and the released code differ or are silent.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from wemmu.config.base import Config, LocalPath, Positive, Seed
from wemmu.config.objectives import ColdStart, FlowGRPO, UnifiedGRPO
from wemmu.config.recipe import RecipeConfig
from wemmu.config.stage import ResolutionStep, Stage
from wemmu.config.task import Task
from wemmu.recipes.wemmu.config import Bridge

if TYPE_CHECKING:
    from wemmu.config.schema import Memory


class Generator(Config):
    """The decoder, a WeMMU model, and how it renders captions.

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

    modules: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "llm": ("vlm.model.language_model.", "vlm.lm_head."),
        "dit": ("generator.dit.",),
    }
    backbones: ClassVar[tuple[str, ...]] = ("vlm", "vae", "dit")
    tasks: ClassVar[tuple[Task, ...]] = (Task.CAPTION, Task.UNDERSTANDING)
    objectives: ClassVar[tuple[str, ...]] = ("caption", "unified_grpo", "cold_start", "flow_grpo")
    engines: ClassVar[tuple[str, ...]] = ("single", "zero3")
    offloadable: ClassVar[tuple[str, ...]] = ("generator",)
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
        objective, name = stage.objective, f"stage {stage.name}"
        if Task.UNDERSTANDING in stage.mixture and objective.kind != "caption":
            raise ValueError(f"{name}: {objective.kind} compares images of captions; valid tasks: caption")
        self._check_trains(stage)
        if isinstance(objective, UnifiedGRPO | FlowGRPO) and stage.steps % objective.updates:
            raise ValueError(
                f"{name}: its {stage.steps} steps are no multiple of objective.updates {objective.updates}, the steps "
                "of one rollout"
            )
        steps = self.generator.steps
        if isinstance(objective, FlowGRPO) and objective.first + objective.window > steps:
            raise ValueError(
                f"{name}: objective.first {objective.first} + objective.window {objective.window} are more than "
                f"recipe.generator.steps {steps}"
            )
        if isinstance(objective, ColdStart) and objective.last > steps:
            raise ValueError(f"{name}: objective.last {objective.last} is more than recipe.generator.steps {steps}")
        if isinstance(objective, ColdStart) and self.reward.control != "none":
            raise ValueError(f"{name}: recipe.reward.control is for rewards, and cold_start has none; valid: none")

    def _check_trains(self, stage: Stage | ResolutionStep) -> None:
        """Refuse modules that the objective gives no gradient."""
        name, kind, trains = f"stage {stage.name}", stage.objective.kind, set(stage.trains)
        valid = {"cold_start": {"llm", "dit"}, "flow_grpo": {"dit"}}.get(kind, {"llm"})
        if wrong := sorted(trains - valid):
            raise ValueError(f"{name}: {kind} does not train {', '.join(wrong)}; valid: {', '.join(sorted(valid))}")
        if kind == "cold_start" and "llm" in trains and self.cond_encoder != "policy":
            raise ValueError(
                f"{name}: cold_start trains llm through the generator's condition, which recipe.cond_encoder: "
                "reference takes from another VLM; set recipe.cond_encoder=policy, or train dit alone"
            )

    def check_memory(self, memory: "Memory", stages: Sequence[Stage | ResolutionStep], engine: str) -> None:
        super().check_memory(memory, stages, engine)
        for stage in stages:
            if "generator" in memory.offload and stage.objective.kind in ("cold_start", "flow_grpo"):
                raise ValueError(
                    f"stage {stage.name}: memory.offload keeps the generator in host memory while it renders nothing, "
                    f"but {stage.objective.kind} needs it all the time; set memory.offload=[]"
                )
