"""The config of WeMMU: noisy query tokens that bridge a frozen VLM and a DiT."""

from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from wemmu.config.base import Config, Positive, Share, not_default
from wemmu.config.objectives import LossWeighting, Objective, TimeSampling
from wemmu.config.recipe import RecipeConfig
from wemmu.config.task import EDITS, GENERATION_TASKS, Task

if TYPE_CHECKING:
    from wemmu.config.stage import ResolutionStep, Stage


class FlowMatching(Objective):
    """flow: conditional flow matching. contrastive: minus `weight` times the distance to another sample's target."""

    kind: Literal["flow", "contrastive"] = "flow"
    weight: Share = 0.05
    time: TimeSampling = TimeSampling()
    weighting: LossWeighting = LossWeighting()

    titles: ClassVar[Mapping[str, str]] = {"flow": "flow matching", "contrastive": "contrastive flow matching"}

    @property
    def pairs(self) -> bool:
        return self.kind == "contrastive"

    @property
    def unused(self) -> Mapping[str, str]:
        found: dict[str, str] = {}
        if self.kind != "contrastive":
            found |= dict.fromkeys(not_default(self, "weight"), f"the kind is {self.kind}, not contrastive")
        if self.time.kind != "logit_normal":
            fields = not_default(self.time, "mean", "std")
            found |= {f"time.{field}": f"time.kind is {self.time.kind}, not logit_normal" for field in fields}
        if self.weighting.kind != "min_snr":
            fields = not_default(self.weighting, "gamma")
            found |= {f"weighting.{field}": f"weighting.kind is {self.weighting.kind}, not min_snr" for field in fields}
        return found


class Queries(Config):
    """Design of the query tokens.

    noisy: N(0, std^2), new at every step, one per VLM token of the target image (the paper).
    learnable_fixed: `number` trained vectors whatever the resolution (MetaQueries).
    learnable_dynamic: a trained table, cropped from the centre to the current grid.
    Both begin as N(0, std^2).
    """

    design: Literal["noisy", "learnable_fixed", "learnable_dynamic"] = "noisy"
    # A learnable scale stayed at 1.0 over 80M samples in the paper, hence plain N(0, I).
    std: Annotated[float, Field(gt=0, le=1e3)] = 1.0
    number: Annotated[Positive, Field(le=2**16)] = 64
    # sincos: add the 2-D sine-cosine code of a query's row and column. Without it a noise token knows its place by
    # M-RoPE alone, whose bases at full size turn a column by 2e-4 rad or less in the slowest section.
    position: Literal["none", "sincos"] = "none"


class States(Config):
    """The states of the pathway that the condition is made of.

    layers: how many layers give states, evenly spaced, the last one among them; each state passes the final norm.
    combine: `stack` puts them side by side on the channels (DeepGen); `route` takes a mean for each token, weighted by
    the softmax of a linear layer of the last state (SPAR). With one layer both are the paper's.
    normalise: divide each state by its root mean square before the position table is added, so that the table's share
    does not depend on the gains of the VLM's final norm (InternVL-U).
    """

    layers: Positive = 1
    combine: Literal["stack", "route"] = "stack"
    normalise: bool = False


class Bridge(Config):
    """The bridge between the VLM and the DiT."""

    queries: Queries = Queries()
    vae_branch: bool = True
    # Share of the steps of the task reconstruction in which the image reaches the pathway through the VLM alone: the
    # self-reconstruction of RecA, from what the VLM understands and not from latents.
    reconstruct_without_vae: Annotated[float, Field(ge=0, le=1)] = 0.0
    states: States = States()
    # The DiT takes the latents of an edit's first input image behind those of the noisy image, on the channels (VIBE,
    # DIM). Their weights begin at zero; without an edit the latents are zero.
    source_latents: bool = False
    # Side of the position table in tokens; it bounds the resolution. 64 tokens are 1792 px of Qwen2.5-VL.
    position_table: Annotated[Positive, Field(le=2048)] = 64
    # OPEN in the paper. The usual 0.02 is too small beside the pathway's outputs for thousands of steps, and noisy
    # queries have no other strong mark of their column.
    position_std: Annotated[float, Field(ge=0, le=1e3)] = 1.0
    # Which entries of the table an image uses. centre: the crop of its size (the paper). span: entries over the whole
    # table, evenly spaced, so that a low resolution trains the corners that a high one uses (InternVL-U).
    position_crop: Literal["centre", "span"] = "centre"


class WeMMU(RecipeConfig):
    """A bridge, trained alone or with the DiT, that conditions the DiT on a frozen VLM."""

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
    objectives: ClassVar[tuple[type[Objective], ...]] = (FlowMatching,)
    engines: ClassVar[tuple[str, ...]] = ("single", "zero3", "hybrid")
    draws: ClassVar[bool] = True
    adaptable: ClassVar[tuple[str, ...]] = ("pathway", "dit")
    copies: ClassVar[Mapping[str, str]] = {"bridge.pathway.": "vlm"}
    sharded: ClassVar[tuple[str, ...]] = ("bridge", "dit")
    offloadable: ClassVar[tuple[str, ...]] = ("vlm", "vae")
    does: ClassVar[str] = "generates and edits images"

    @property
    def position_table(self) -> int:
        return self.bridge.position_table

    @property
    def random(self) -> tuple[str, ...]:
        """Return the bridge without the copy of the VLM; learnable queries are trained by every stage."""
        return ("vae_branch", "position_mlp") if self.bridge.vae_branch else ("position_mlp",)

    @property
    def quantizable(self) -> Mapping[str, tuple[str, ...]]:
        return {"vlm": ("vlm.vlm",), "pathway": ("bridge.pathway",), "dit": ("dit",)}

    def tokens_beside(self, images: int, samples: int, output: int) -> int:
        """Return the tokens of the pathway: those of the VAE branch, and the queries."""
        queries = self.bridge.queries
        return images * self.bridge.vae_branch + samples * (
            queries.number if queries.design == "learnable_fixed" else output
        )

    def check(self, stages: Sequence["Stage | ResolutionStep"], engine: str) -> None:
        super().check(stages, engine)
        if self.bridge.source_latents and engine == "hybrid":
            raise ValueError("recipe.bridge.source_latents does not run on engine hybrid; valid: single, zero3")
        if self.bridge.source_latents and "dit" in self.lora:
            raise ValueError(
                "recipe.bridge.source_latents adds trained channels to the DiT, but recipe.lora.dit freezes its "
                "weights; remove one of the two"
            )

        if self.bridge.reconstruct_without_vae and not self.bridge.vae_branch:
            raise ValueError(
                "recipe.bridge.reconstruct_without_vae leaves out the VAE branch in a share of the steps, and "
                "recipe.bridge.vae_branch=false in all of them; set one of the two"
            )

    def check_from_zero(self, trained: Set[str]) -> None:
        super().check_from_zero(trained)
        if self.bridge.source_latents and "dit" not in trained:
            raise ValueError(
                "recipe.bridge.source_latents: no stage trains dit, so its channels for them would stay zero; name it "
                "in a stage's trains, or set recipe.bridge.source_latents=false"
            )

    def unused(self, stages: Sequence["Stage | ResolutionStep"]) -> Mapping[str, str]:
        tasks, queries, found = {task for stage in stages for task in stage.mixture}, self.bridge.queries, {}
        if self.bridge.reconstruct_without_vae and Task.RECONSTRUCTION not in tasks:
            found["bridge.reconstruct_without_vae"] = "no stage mixes the task reconstruction"
        # A start may have been trained with them.
        if self.bridge.source_latents and tasks.isdisjoint(EDITS) and stages[0].start is None:
            found["bridge.source_latents"] = f"no stage mixes an edit ({', '.join(EDITS)})"
        if queries.design != "learnable_fixed" and not_default(queries, "number"):
            found["bridge.queries.number"] = f"the design is {queries.design}, not learnable_fixed"
        if self.bridge.states.layers == 1 and not_default(self.bridge.states, "combine"):
            found["bridge.states.combine"] = "bridge.states.layers is 1"
        return found

    def check_stage(self, stage: "Stage | ResolutionStep") -> None:
        """Refuse a stage that trains a part that this bridge lacks, or does not train learnable queries."""
        super().check_stage(stage)
        design = self.bridge.queries.design
        if "queries" in stage.trains and design == "noisy":
            raise ValueError(f"stage {stage.name} trains the queries, but noisy queries have no parameters")
        if "queries" not in stage.trains and design != "noisy":
            raise ValueError(f"stage {stage.name} must train the queries of design {design}")
        if "vae_branch" in stage.trains and not self.bridge.vae_branch:
            raise ValueError(f"stage {stage.name} trains the VAE branch, but recipe.bridge.vae_branch is off")
        if "dit" in stage.trains and stage.optimizer.module_lr.get("dit") is None:
            raise ValueError(f"stage {stage.name} trains the DiT, so optimizer.module_lr.dit is needed")
        if stage.objective.pairs and stage.global_batch < 2:
            raise ValueError(f"stage {stage.name}: the contrastive objective needs another sample in the batch")
