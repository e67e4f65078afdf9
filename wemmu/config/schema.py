"""The schema of a curriculum. Where the paper is silent (facts marked OPEN), the default is argued beside the field."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field, model_validator

from wemmu.config.base import Config, Count, Guidance, LocalPath, Location, Named, Positive, Seed, SidePx, SolverSteps
from wemmu.config.benchmarks import BenchmarkOptions, Benchmarks, FidelityOptions
from wemmu.config.prepare import ImageSizing, Prepare
from wemmu.config.registry import RECIPES, AnyRecipe
from wemmu.config.stage import ResolutionStep, Stage
from wemmu.config.upgrade import upgraded
from wemmu.readable import valid


def _nearest(batch: int, ranks: int) -> str:
    """Return the multiples of `ranks` around a global batch, for a message."""
    below = batch // ranks * ranks
    return " and ".join(str(n) for n in (below, below + ranks) if n)


class Backbones(Config):
    """Directories in the published layout: a VLM, an autoencoder and, where the recipe has one, a DiT.

    `sana: DIR`, a whole pipeline of diffusers, stands for `dit: DIR/transformer, vae: DIR/vae`.
    """

    vlm: LocalPath
    vae: LocalPath | None = None
    dit: LocalPath | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="before")
    @classmethod
    def _of_a_pipeline(cls, values: Any) -> Any:
        if isinstance(values, dict) and (pipeline := values.get("sana")) is not None:
            rest = {name: value for name, value in values.items() if name != "sana"}
            # A name of a config knows the folders that a relative path is searched in.
            folders = pipeline.folders if isinstance(pipeline, Named) else ()
            parts = {"dit": "transformer", "vae": "vae"}
            return {name: Named.of(f"{pipeline}/{part}", folders) for name, part in parts.items()} | rest
        return values

    def directories(self, kinds: Sequence[str]) -> dict[str, Path]:
        """Return kind -> directory of those of `kinds` that are given."""
        found = {kind: getattr(self, kind) for kind in kinds}
        return {kind: directory for kind, directory in found.items() if directory is not None}


# Kinds of numbers that frozen weights can have: 8 bit, or QLoRA's 4-bit NormalFloat.
Quantization = Literal["int8", "nf4"]


class Memory(Config):
    """What one device holds: `micro_batch` samples at `reference_resolution`, scaled by area to other resolutions."""

    micro_batch: Positive
    reference_resolution: SidePx
    # Recompute each layer of the bridge and the DiT in the backward pass instead of keeping what is inside.
    checkpointing: bool = False
    # Images whose frozen features (latents, vision tokens) stay in host memory; pays for data sets seen many times.
    cached_images: Count = 0
    # Frozen parts whose linear layers train in 8 or 4 bit, see `RecipeConfig.quantizable`; needs bitsandbytes.
    quantize: dict[str, Quantization] = Field(default_factory=dict)
    # Frozen parts that stay in host memory except while they work, see `RecipeConfig.offloadable`.
    offload: tuple[str, ...] = ()

    def micro_batch_at(self, resolution: int, global_batch: int, world: int = 1) -> tuple[int, int]:
        """Return (micro-batch per rank, accumulation steps) whose product with `world` is exactly `global_batch`.

        Raises:
            ValueError: if the global batch cannot be divided among the ranks.
        """
        if global_batch % world:
            raise ValueError(f"the global batch {global_batch} is not a multiple of the {world} ranks")
        per_rank = global_batch // world
        fits = max(1, int(self.micro_batch * (self.reference_resolution / resolution) ** 2))
        micro = max(m for m in range(1, min(fits, per_rank) + 1) if per_rank % m == 0)
        return micro, per_rank // micro


# Where the random numbers of a training step are drawn; see `wemmu.noise.Noise`.
NoiseSource = Literal["auto", "host", "device"]


class Kernels(Config):
    """What makes a step fast; see docs/performance.md. `auto`: on a GPU in bfloat16, where it was measured to help.

    NVIDIA's Apex, torch's fused AdamW and the kernels of attention are probed and reported without an option.
    """

    # RMSNorm in one kernel, Apex's or torch's. In bfloat16 it rounds once where the plain one rounds twice, so a run
    # that began without it continues with other last bits.
    fused_norms: Literal["auto"] | bool = "auto"
    # torch.compile of the layers of pathway, DiT, frozen VLM and autoencoder; needs a C++ compiler, and a minute to
    # begin.
    compile: Literal["auto"] | bool = "auto"
    # Sana's linear attention in the type of the weights instead of float32; see wemmu/backbones/linear_attention.py.
    narrow_attention: Literal["auto"] | bool = "auto"
    # The frozen autoencoder's 2D convolutions with channels last in memory. Off: without compilation it helped at
    # 1024 px and hurt at 512 px on one H200; with it nobody has measured it.
    channels_last: bool = False
    # host: on the CPU, the same numbers everywhere. device: on the GPU, without waiting. auto: where the model is.
    noise: NoiseSource = "auto"
    # The same bits from every run on the same kind of GPU, at a price: torch's deterministic algorithms, no cuDNN
    # attention. An operation that has no deterministic form ends the run with its name.
    deterministic: bool = False


class Parallel(Config):
    """How many processes train, and how they share the model; see docs/parallel.md.

    single: one process. zero3: DeepSpeed ZeRO-3 shards all that is trained over the ranks. hybrid: `tp` x `pp` ranks
    share a DiT, by slices of its layers and by stages; the bridge, and the DiT over the copies there are, sharded.
    """

    engine: Literal["single", "zero3", "hybrid"] = "single"
    ranks: Annotated[Positive, Field(le=10**6)] = 1
    tp: Positive = 1
    pp: Positive = 1

    @model_validator(mode="after")
    def _check(self) -> "Parallel":
        degrees = self.tp * self.pp
        if self.engine == "single" and self.ranks > 1:
            raise ValueError(
                f"engine single is one process, but ranks is {self.ranks}; set parallel.engine to zero3 or hybrid"
            )
        if self.engine != "hybrid" and degrees > 1:
            raise ValueError(
                f"engine {self.engine} has no tensor or pipeline parallelism; for tp {self.tp} x pp {self.pp} set "
                "parallel.engine=hybrid"
            )
        if self.ranks % degrees:
            raise ValueError(
                f"{self.ranks} ranks cannot be divided into groups of tp {self.tp} x pp {self.pp}; "
                f"valid: multiples of {degrees}"
            )
        return self


class Data(Config):
    """`shards` is a data set that `wemmu data write` wrote; with `prepare` the launcher's first job writes it.

    With `remote`, a URL that fsspec opens, the data set is there, and `shards` is this machine's cache of it, which
    holds `cache_gb` GB at most.
    """

    shards: LocalPath
    prepare: Prepare | None = None
    remote: Location | None = None
    cache_gb: Annotated[float, Field(gt=0)] | None = None
    # Loader threads that decode ahead of the step; 0 reads in the training process.
    workers: Annotated[int, Field(ge=0, le=256)] = 1
    # A record that is not what was written: stop, or take another in its place and count it.
    damaged: Literal["stop", "skip"] = "stop"
    # Resume although seed, global batch, mixture or records differ from the checkpoint's, so that other samples follow.
    resume_reordered: bool = False
    # Records of each stream, a quarter of it at most, that no stage trains on, for the validation loss.
    validation: Count = 0

    @property
    def max_aspect(self) -> float:
        """Return the largest aspect ratio of the images; without `prepare`, the default's."""
        return (self.prepare.images if self.prepare else ImageSizing()).max_aspect

    @model_validator(mode="after")
    def _check(self) -> "Data":
        if self.remote is not None and self.prepare is not None:
            raise ValueError("data.remote reads a finished data set, data.prepare writes one; remove one of them")
        if (self.remote is None) != (self.cache_gb is None):
            raise ValueError(
                "set data.remote and data.cache_gb (the size of its cache in data.shards) together, or neither"
            )
        return self


class SamplePrompt(Config):
    """A fixed prompt of the sample grids; images by path."""

    text: str = ""
    images: tuple[LocalPath, ...] = ()


# `wemmu.sampling.solvers` has them; heun evaluates the model twice a step.
SolverName = Literal["euler", "heun"]


class Sampling(Config):
    """How sample images are drawn during and after training. Guidance rules and weights: the paper, "Inference"."""

    steps: SolverSteps = 20
    solver: SolverName = "euler"
    t2i: Guidance = 4.0
    image: Guidance = 2.0
    instruction: Guidance = 3.0
    multi: Guidance = 3.0
    seed: Seed = 0
    # Fixed prompts that are drawn again as the model learns.
    prompts: tuple[SamplePrompt, ...] = ()


class Logging(Config):
    every: Positive = 10
    samples_every: Positive = 500
    checkpoint_every: Positive = 500
    # Seconds without a step, an image or a checkpoint after which a rank counts as hung and its job is ended.
    hang_after: Annotated[float, Field(gt=0)] = 1800.0
    keep_checkpoints: Positive = 2
    # auto: online where there is a key, else offline (`wemmu.config.wandb_mode`); tools/wandb_sync.py uploads later.
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    wandb_project: str = "wemmu"


class Evaluation(Config):
    """Exact scores after a stage, on `prompts` held-out prompts for each task; 0 skips the evaluation.

    benchmarks: what else runs after each stage that names none of its own. ranks: processes that share the images of a
    benchmark.
    """

    prompts: Annotated[int, Field(ge=0, le=10**6)] = 0
    batch: Positive = 64
    benchmarks: Benchmarks = Field(default_factory=lambda: Benchmarks())
    ranks: Positive = 1

    def after(self, stage: Stage | ResolutionStep) -> dict[str, BenchmarkOptions]:
        """Return the benchmarks that run after a stage, with their options."""
        named = self.benchmarks if stage.benchmarks is None else stage.benchmarks
        return dict(cast(dict[str, BenchmarkOptions], named))


class _Shared(Config):
    """What the stages of a curriculum have in common; also reads what earlier versions wrote."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_\-]+$")]
    seed: Seed = 0
    backbones: Backbones
    recipe: AnyRecipe = Field(default_factory=RECIPES[0])
    data: Data
    memory: Memory
    parallel: Parallel = Parallel()
    kernels: Kernels = Kernels()
    sampling: Sampling = Sampling()
    logging: Logging = Logging()
    evaluation: Evaluation = Evaluation()
    threads: Annotated[Positive, Field(le=4096)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _upgraded(cls, values: Any) -> Any:
        return upgraded(values) if isinstance(values, dict) else values


class Curriculum(_Shared):
    """Everything a chain of stages needs; `configs/` holds examples."""

    # An exported pipeline to begin with. What this config leaves out of backbones, bridge, sampling, resolution,
    # timestep shift and the first stage's start is the export's (`wemmu.config.exported`).
    export: LocalPath | None = None
    stages: tuple[Stage, ...]

    @model_validator(mode="after")
    def _check(self) -> "Curriculum":
        names = [s.name for s in self.stages]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"stages need distinct names, got: {', '.join(names) or 'none'}")
        given = self.backbones.directories(self.recipe.backbones)
        if lacking := [name for name in self.recipe.backbones if name not in (*given, *self.recipe.optional)]:
            raise ValueError(f"the recipe {self.recipe.kind} needs backbones.{lacking[0]}, a directory")
        if self.backbones.vae is None and self.data.prepare is not None and self.data.prepare.latents is not None:
            raise ValueError("data.prepare.latents needs backbones.vae, the directory of the autoencoder")
        self.recipe.check(self.stages, self.parallel.engine)
        self.recipe.check_memory(self.memory, self.stages, self.parallel.engine)
        absent = {*self.memory.offload, *self.memory.quantize} & (set(self.recipe.backbones) - set(given))
        if absent:
            raise ValueError(f"memory names {', '.join(sorted(absent))}, but backbones has no {min(absent)}; remove it")
        # A start may bring what no stage trains any more.
        if self.export is None and self.stages[0].start is None:
            self.recipe.check_from_zero({module for stage in self.stages for module in stage.trains})
        for stage in self.stages:
            if stage.global_batch % self.parallel.ranks:
                raise ValueError(
                    f"stage {stage.name}: the global batch {stage.global_batch} is not a multiple of the "
                    f"{self.parallel.ranks} ranks; the nearest are {_nearest(stage.global_batch, self.parallel.ranks)}"
                )
            if stage.gate.scores and not self.evaluation.prompts:
                raise ValueError(f"stage {stage.name}: gate.scores needs an evaluation; set evaluation.prompts (now 0)")
            self._check_benchmarks(stage)
            if stage.has_plateau and not self.data.validation:
                raise ValueError(
                    f"stage {stage.name}: next_resolution.plateau needs held-out records, but data.validation is 0; "
                    "set it to a number of records per stream"
                )
        return self

    def _check_benchmarks(self, stage: Stage) -> None:
        named = self.evaluation.after(stage)
        if lacking := [one.benchmark for one in stage.gate.benchmarks if one.benchmark not in named]:
            raise ValueError(
                f"stage {stage.name}: its gate reads {lacking[0]}, which does not run after it; add it to "
                f"evaluation.benchmarks or to the stage's benchmarks (there: {', '.join(named) or 'none'})"
            )
        fidelity = named.get("fidelity")
        if isinstance(fidelity, FidelityOptions) and fidelity.shards is None and not self.data.validation:
            raise ValueError(
                f"stage {stage.name}: fidelity scores records that no stage trains on, but data.validation is 0; set "
                "it, or name another data set in the benchmark's shards"
            )

    def stage_run(self, name: str) -> "StageRun":
        """Return the self-contained config of a stage's job; of its last resolution if it has several.

        Raises:
            ValueError: if there is no such stage, naming those there are.
        """
        return self.resolution_runs(name)[-1]

    def resolution_runs(self, name: str) -> tuple["StageRun", ...]:
        """Return `stage_run` for each of its resolutions."""
        for index, stage in enumerate(self.stages):
            if stage.name == name:
                shared = {field: getattr(self, field) for field in _Shared.model_fields}
                return tuple(
                    StageRun(**{**shared, "stage": step, "stage_index": index}) for step in stage.resolution_steps
                )
        raise ValueError(f"there is no stage {name!r}; {valid(name, [s.name for s in self.stages], 'valid choices')}")


class StageRun(_Shared):
    """One stage at one resolution, with everything it shares with the others: what a training job reads."""

    stage: ResolutionStep
    stage_index: int

    @model_validator(mode="after")
    def _check(self) -> "StageRun":
        self.recipe.check([self.stage], self.parallel.engine)
        self.recipe.check_memory(self.memory, [self.stage], self.parallel.engine)
        return self

    def rates(self, name: str, ndim: int) -> tuple[float, float]:
        """`Optimizer.rates` of the parameter with this canonical name."""
        return self.stage.optimizer.rates(self.recipe.module_of(name), ndim)

    @property
    def world(self) -> str | None:
        """`shapes` where all of its data is of the built-in world; None where it is not, or where nobody says."""
        kinds = {source.kind for source in self.data.prepare.sources} if self.data.prepare else set()
        return "shapes" if kinds == {"shapes"} else None
