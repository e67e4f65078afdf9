"""The config of UAE (arXiv 2509.09666): a VLM whose captions are rewarded by what a generator reconstructs from them.

The default is the paper's fifth version: only the language model learns, from rewards. docs/uae.md says where the paper
and the released code differ or are silent.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from wemmu.config.base import Config, Guidance, LocalPath, Positive, Seed, SolverSteps, not_default
from wemmu.config.objectives import SDE, Aggregate, Objective, Scale, Std
from wemmu.config.recipe import RecipeConfig
from wemmu.config.task import Task
from wemmu.recipes.wemmu.config import Bridge

if TYPE_CHECKING:
    from wemmu.config.schema import Memory
    from wemmu.config.stage import ResolutionStep, Stage


class CaptionTuning(Objective):
    """Cross-entropy of captions that the data set has: the mean over a caption's tokens, then over the batch."""

    kind: Literal["caption"]

    titles: ClassVar[Mapping[str, str]] = {"caption": "caption tuning"}


class UnifiedGRPO(Objective):
    """UAE: GRPO over captions, rewarded by what a frozen generator reconstructs from them (arXiv 2509.09666 v5).

    See `wemmu.objectives.grpo` for the formulas. The paper names group 4, temperature 1 and beta 1e-6; the other
    defaults are ours or the field's, argued beside them.
    """

    kind: Literal["unified_grpo"]
    # Captions of each image.
    group: Annotated[int, Field(ge=2, le=1024)] = 4
    # Of sampling; log-probabilities are of the same distribution.
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    scale: Scale = "group"
    std: Std = "unbiased"
    epsilon: Annotated[float, Field(ge=1e-12, le=1e3)] = 1e-4
    # OPEN in the paper, which cites GRPO. With dr_grpo and dapo a long caption is not spared for its length.
    aggregate: Aggregate = "grpo"
    # OPEN in the paper; PPO's. `clip_high` above it is DAPO's clip-higher; equal to `clip` if not given.
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: Annotated[float, Field(gt=0)] | None = None
    # Cap on the ratio of tokens with a negative advantage.
    delta: Annotated[float, Field(gt=1)] | None = None
    # Weight of k3, the distance from the policy that the stage began with. With 0 no copy of it is kept.
    beta: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    # Optimizer steps for each rollout (mu). With 1 the ratio is 1, nothing is clipped, and the loss is about 0 although
    # its gradient is not.
    updates: Positive = 1

    titles: ClassVar[Mapping[str, str]] = {"unified_grpo": "GRPO over captions"}

    @property
    def unused(self) -> Mapping[str, str]:
        return dict.fromkeys(not_default(self, "std", "epsilon") if self.scale == "none" else (), "scale is none")

    @property
    def high(self) -> float:
        return self.clip if self.clip_high is None else self.clip_high

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.delta is not None and self.delta <= 1 + self.high:
            raise ValueError(f"objective.delta {self.delta} must be above the clip range, 1 + {self.high}")
        return self


class ColdStart(Objective):
    """UAE, first stage of arXiv 2509.09666 v1: 1 - cosine of image and reconstruction, differentiated.

    The VLM's captions are sampled at `temperature`; no gradient goes through the choice of words. The gradient reaches
    the DiT through the last steps of the sampler, and the language model through the condition.
    """

    kind: Literal["cold_start"]
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    # Steps of the sampler that have a gradient, the last ones. OPEN in the paper; the released code takes all of 10.
    last: Positive = 1

    titles: ClassVar[Mapping[str, str]] = {"cold_start": "a differentiable cold start"}


class FlowGRPO(Objective):
    """UAE, third stage of arXiv 2509.09666 v1: GRPO over the sampler's path, which moves the DiT (arXiv 2505.05470).

    The paper does not name the algorithm; this is the field's. For each image the VLM writes one caption, and the
    sampler draws a group of images from it: they begin with the same noise and differ by the stochastic steps of a
    window, see `wemmu.sampling.sde`. Defaults: Flow-GRPO and its fast variant.
    """

    kind: Literal["flow_grpo"]
    # Images drawn of each caption.
    group: Annotated[int, Field(ge=2, le=1024)] = 8
    # Who wrote the captions: the VLM, or whoever wrote those of the data set.
    captions: Literal["policy", "data"] = "policy"
    # Of sampling captions.
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    sde: SDE = "flow"
    noise_level: Annotated[float, Field(gt=0, le=1)] = 0.7
    # The stochastic steps: `window` steps from step `first` on, of recipe.generator.steps. Other steps are Euler's.
    first: Annotated[int, Field(ge=0)] = 0
    window: Positive = 2
    scale: Scale = "group"
    std: Std = "population"
    epsilon: Annotated[float, Field(ge=1e-12, le=1e3)] = 1e-4
    # Advantages are cut at plus and minus this.
    limit: Annotated[float, Field(gt=0)] = 5.0
    # Log-probabilities are means over latent elements, hence a small range.
    clip: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    # Weight of KL to the DiT that the stage began with. With 0 no copy of it is kept.
    beta: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    # Optimizer steps for each rollout, as in UnifiedGRPO.
    updates: Positive = 1

    titles: ClassVar[Mapping[str, str]] = {"flow_grpo": "GRPO over paths of the sampler"}

    @property
    def unused(self) -> Mapping[str, str]:
        found = dict.fromkeys(not_default(self, "std", "epsilon") if self.scale == "none" else (), "scale is none")
        asks = self.captions == "policy"
        return found | dict.fromkeys(() if asks else not_default(self, "temperature"), "captions is data")


# How the names of encoders that reward nothing begin in the model.
HELD_OUT = "held_out_"


class Generator(Config):
    """The decoder, a WeMMU model, and how it renders captions.

    weights: a checkpoint, shipped weights or an exported bridge, as `start` of a stage takes; what it does not hold are
    the backbones' own.
    """

    weights: LocalPath
    bridge: Bridge = Bridge()
    # Timestep shift at the stage's resolution, as the generator was trained with.
    shift: Annotated[float, Field(ge=1e-3, le=1e3)] = 3.0
    # OPEN in the paper. Few steps are enough for a reward; inference takes more.
    steps: SolverSteps = 20
    guidance: Guidance = 4.0
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
    # The prompt for every image. OPEN in the paper, which does not print a length request.
    instruction: str = "Describe this image in detail."
    # Tokens of a caption, its end included. OPEN in the paper; the length of the released inference.
    max_length: Annotated[Positive, Field(le=10**5)] = 512
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
    objectives: ClassVar[tuple[type[Objective], ...]] = (CaptionTuning, UnifiedGRPO, ColdStart, FlowGRPO)
    engines: ClassVar[tuple[str, ...]] = ("single", "zero3")
    # A DiT that learns is sharded, too; one that does not is whole on every rank.
    sharded: ClassVar[tuple[str, ...]] = ("vlm",)
    offloadable: ClassVar[tuple[str, ...]] = ("generator",)
    draws: ClassVar[bool] = False
    adaptable: ClassVar[tuple[str, ...]] = ("llm", "dit")
    does: ClassVar[str] = "captions an image, draws it again from the caption alone, and answers questions"

    @property
    def asks_for_captions(self) -> str:
        return self.instruction

    @property
    def quantizable(self) -> Mapping[str, tuple[str, ...]]:
        """generator: its VLM and its bridge, without the DiT, which can learn. reward: all encoders that compare."""
        parts = {
            "vision": ("vlm.model.visual.blocks",), "llm": ("vlm.model.language_model",),
            "generator": ("generator.vlm.vlm", "generator.bridge.pathway"), "dit": ("generator.dit",),
        }  # fmt: skip
        return {**parts, "reward": ("encoders",)} if self.encoders else parts

    @property
    def encoders(self) -> Mapping[str, Path]:
        named = {"reward": self.reward.encoder, **{HELD_OUT + name: e for name, e in self.reward.held_out.items()}}
        return {f"encoders.{name}": encoder for name, encoder in named.items() if encoder != "pixels"}

    def export_of(self, stage: "Stage | ResolutionStep") -> Literal["pipeline", "generator", "vlm"]:
        return "generator" if stage.trains == ("dit",) else "vlm"

    def unused(self, stages: Sequence["Stage | ResolutionStep"]) -> Mapping[str, str]:
        if any(isinstance(stage.objective, UnifiedGRPO | FlowGRPO) for stage in stages):
            return {}
        set_anyway = [
            name for name, on in (("held_out", self.reward.held_out), ("control", self.reward.control != "none")) if on
        ]
        return {f"reward.{name}": "no stage learns from rewards" for name in set_anyway}

    def check_stage(self, stage: "Stage | ResolutionStep") -> None:
        """Refuse questions that have no reward, and a rollout that is cut."""
        super().check_stage(stage)
        objective, name = stage.objective, f"stage {stage.name}"
        if Task.UNDERSTANDING in stage.mixture and objective.kind != "caption":
            raise ValueError(f"{name}: {objective.kind} compares images of captions; valid tasks: caption")
        self._check_trains(stage)
        if isinstance(objective, UnifiedGRPO | FlowGRPO) and stage.steps % objective.updates:
            raise ValueError(
                f"{name}: its {stage.steps} steps are not a multiple of objective.updates {objective.updates}, the "
                "steps of one rollout"
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

    def _check_trains(self, stage: "Stage | ResolutionStep") -> None:
        """Refuse modules that the objective gives no gradient."""
        name, kind, trains = f"stage {stage.name}", stage.objective.kind, set(stage.trains)
        valid = {"cold_start": {"llm", "dit"}, "flow_grpo": {"dit"}}.get(kind, {"llm"})
        if wrong := sorted(trains - valid):
            raise ValueError(f"{name}: {kind} does not train {', '.join(wrong)}; valid: {', '.join(sorted(valid))}")
        if kind == "cold_start" and "llm" in trains and self.cond_encoder != "policy":
            raise ValueError(
                f"{name}: cold_start trains llm through the generator's condition, but with "
                "recipe.cond_encoder: reference another VLM computes it; set "
                "recipe.cond_encoder=policy, or train dit alone"
            )

    def check_memory(self, memory: "Memory", stages: Sequence["Stage | ResolutionStep"], engine: str) -> None:
        super().check_memory(memory, stages, engine)
        for stage in stages:
            if "generator" in memory.offload and stage.objective.kind in ("cold_start", "flow_grpo"):
                raise ValueError(
                    f"stage {stage.name}: memory.offload keeps the generator in host memory between uses, "
                    f"but {stage.objective.kind} needs it all the time; set memory.offload=[]"
                )
