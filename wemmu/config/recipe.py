"""What every recipe says of itself in its config, without torch: which parts it has, and which stages fit it."""

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from wemmu.config.base import Config
from wemmu.config.lora import LoRA
from wemmu.config.objectives import Objective
from wemmu.config.task import Task
from wemmu.readable import valid

if TYPE_CHECKING:
    from wemmu.config.schema import Memory
    from wemmu.config.stage import ResolutionStep, Stage


class RecipeConfig(Config):
    """The base of the configs that `recipe:` chooses from, by their `kind`.

    modules: what a stage can name in `trains` -> how the canonical names of its weights begin.
    backbones: the fields of `backbones` that the recipe loads; they are the first words of these weights' names, too.
    tasks, objectives, engines: those that it can train with.
    draws: whether the model makes images from prompts. does: what it does, on a page.
    adaptable: the modules that can learn by adapters; these are in what the first of the module's prefixes names.
    copies: how names of weights begin that are copies of a backbone's until they are trained -> the backbone.
    sharded: the children of the model that hold what stages can train and that ZeRO-3 therefore shards.
    offloadable: the children of the model that `memory.offload` can name.
    lora: module -> its adapters. A stage that trains such a module trains the adapters alone.
    """

    kind: str
    lora: dict[str, LoRA] = Field(default_factory=dict)

    modules: ClassVar[Mapping[str, tuple[str, ...]]]
    backbones: ClassVar[tuple[str, ...]]
    tasks: ClassVar[tuple[Task, ...]]
    objectives: ClassVar[tuple[type[Objective], ...]]
    engines: ClassVar[tuple[str, ...]]
    draws: ClassVar[bool]
    adaptable: ClassVar[tuple[str, ...]] = ()
    copies: ClassVar[Mapping[str, str]] = {}
    sharded: ClassVar[tuple[str, ...]]
    offloadable: ClassVar[tuple[str, ...]] = ()
    does: ClassVar[str]

    @property
    def optional(self) -> tuple[str, ...]:
        """The `backbones` that this config can do without."""
        return ()

    @property
    def random(self) -> tuple[str, ...]:
        """The modules that no backbone brings: they begin with random numbers."""
        return ()

    @property
    def quantizable(self) -> Mapping[str, tuple[str, ...]]:
        """The parts that `memory.quantize` can name -> the modules of the model that these are."""
        return {}

    @property
    def encoders(self) -> Mapping[str, Path]:
        """The modules of the model that are frozen image encoders, which are no backbones -> their directories."""
        return {}

    @property
    def position_table(self) -> int:
        """Tokens along a side of the largest image to generate; 0 where the config does not bound it."""
        return 0

    @property
    def asks_for_captions(self) -> str:
        """What the VLM is asked in records of the task caption; recipes without the task ask nothing."""
        return ""

    @property
    def parts(self) -> tuple[str, ...]:
        """The backbones, then the modules; a backbone that can be trained is both."""
        return tuple(dict.fromkeys((*(name for name in self.backbones if name not in self.modules), *self.modules)))

    def tokens_beside(self, images: int, samples: int, output: int) -> int:
        """Return how many tokens a micro-batch has beside its prompts and latents, for the record of a run.

        images: tokens of all input images; output: tokens of the VLM that one image to generate would have.
        """
        return 0

    def export_of(self, stage: "Stage | ResolutionStep") -> Literal["pipeline", "generator", "vlm"]:
        """Return what `wemmu export` makes of a stage: a pipeline, that of a generator inside the model, or a VLM."""
        return "pipeline" if self.draws else "vlm"

    def module_of(self, name: str) -> str | None:
        """Return the module that the weight with this canonical name belongs to; None for what no stage can train."""
        return next((module for module, prefixes in self.modules.items() if name.startswith(prefixes)), None)

    def check(self, stages: Sequence["Stage | ResolutionStep"], engine: str) -> None:
        """Refuse stages, and the engine that is to train them, that do not fit the recipe.

        Raises:
            ValueError: naming the stage, what does not fit and the valid choices.
        """
        name = self.kind
        if engine not in self.engines:
            raise ValueError(f"the recipe {name} does not run on engine {engine}; valid: {', '.join(self.engines)}")
        if odd := [module for module in self.lora if module not in self.adaptable]:
            raise ValueError(
                f"recipe.lora: the recipe {name} has no adapters for {', '.join(odd)}; {valid(odd, self.adaptable)}"
            )
        if self.lora and engine == "hybrid":
            raise ValueError("recipe.lora: engine hybrid does not support adapters; valid engines: single, zero3")
        for stage in stages:
            if not isinstance(stage.objective, self.objectives):
                kinds = [kind for objective in self.objectives for kind in objective.titles]
                problem = f"the recipe {name} has no objective {(kind := stage.objective.kind)}"
                raise ValueError(f"stage {stage.name}: {problem}; {valid(kind, kinds)}")
            wrong = [task for task in stage.mixture if task not in self.tasks]
            if wrong or not stage.mixture:
                problem = f"{', '.join(wrong)} is not a task of the recipe {name}" if wrong else "the mixture is empty"
                raise ValueError(f"stage {stage.name}: {problem}; {valid(wrong, self.tasks, 'valid tasks')}")
            if odd := [module for module in stage.optimizer.module_lr if module not in self.modules]:
                problem = f"optimizer.module_lr names {', '.join(odd)}, which the recipe {name} does not have"
                raise ValueError(f"stage {stage.name}: {problem}; {valid(odd, self.modules)}")
            if absent := [module for module in stage.trains if module not in self.modules]:
                problem = f"the recipe {name} has no {', '.join(absent)} to train"
                raise ValueError(f"stage {stage.name}: {problem}; {valid(absent, self.modules)}")
            self.check_stage(stage)

    def check_memory(self, memory: "Memory", stages: Sequence["Stage | ResolutionStep"], engine: str) -> None:
        """Refuse memory options that the recipe does not support; raises as `check`."""
        for field, named, choices in (
            ("quantize", memory.quantize, self.quantizable), ("offload", memory.offload, self.offloadable)
        ):  # fmt: skip
            if odd := [part for part in named if part not in choices]:
                raise ValueError(f"memory.{field}: {', '.join(odd)} is not possible; {valid(odd, choices)}")
        for part in memory.quantize:
            inside = [
                module for module, prefixes in self.modules.items()
                if any(_overlap(path, prefix) for path in self.quantizable[part] for prefix in prefixes)
            ]  # fmt: skip
            trained = {module for stage in stages for module in stage.trains}
            slices = any(_overlap(path, f"{child}.") for path in self.quantizable[part] for child in self.sharded)
            slices = slices or not trained.isdisjoint(inside)
            if engine == "hybrid" or (engine == "zero3" and slices):
                raise ValueError(
                    f"memory.quantize: engine {engine} cannot shard {part} in 8 or 4 bit; set "
                    f"parallel.engine=single, or remove memory.quantize.{part}"
                )
            copied = {module for module, prefixes in self.modules.items() if any(p in self.copies for p in prefixes)}
            whole = [module for module in inside if module in trained | copied and module not in self.lora]
            if whole:
                adapters = f"give it adapters, recipe.lora.{whole[0]}, or " * (whole[0] in self.adaptable)
                raise ValueError(
                    f"memory.quantize.{part}: all weights of {whole[0]} are trained, and only frozen weights can be in "
                    f"8 or 4 bit; {adapters}remove memory.quantize.{part}"
                )

    def check_from_zero(self, trained: Set[str]) -> None:
        """Refuse what would stay zero in a run that starts from the backbones alone; raises as `check`.

        trained: the modules that its stages train.
        """
        if unused := self.lora.keys() - trained:
            raise ValueError(
                f"recipe.lora: no stage trains {', '.join(sorted(unused))}, so its adapters would stay zero; name it "
                f"in a stage's trains, or remove recipe.lora.{min(unused)}"
            )

    def unused(self, stages: Sequence["Stage | ResolutionStep"]) -> Mapping[str, str]:
        """Return the fields of the recipe with another value than their default that no stage uses -> the reason."""
        return {}

    def check_stage(self, stage: "Stage | ResolutionStep") -> None:
        """Refuse a stage for further reasons of the recipe; raises as `check`."""
        if stage.has_plateau and not self.draws:
            raise ValueError(
                f"stage {stage.name}: next_resolution.plateau needs the validation loss, which exists for generation; "
                f"the recipe {self.kind} ends a resolution by samples"
            )


def _overlap(path: str, prefix: str) -> bool:
    return f"{path}.".startswith(prefix) or prefix.startswith(f"{path}.")
