"""Builds everything that the trainer runs from a stage's config: recipe, engine and loader."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from wemmu import kernels
from wemmu.backbones.linear_attention import narrow
from wemmu.backbones.offload import Offloadable
from wemmu.backbones.vae import FrozenVAE
from wemmu.backbones.weights import OnBlockLoaded, keep_local
from wemmu.checkpoint.adapters import is_adapter
from wemmu.checkpoint.collective import all_ranks
from wemmu.checkpoint.start import start_from
from wemmu.config.schema import StageRun
from wemmu.config.shards import ShardError, StreamSettings
from wemmu.data.loader import Loader
from wemmu.kernels import Kernels
from wemmu.measuring.model import make_model
from wemmu.parallel.engine import Engine
from wemmu.parallel.host_memory import trim
from wemmu.parallel.single import SingleEngine
from wemmu.parallel.topology import ALONE, Topology
from wemmu.published.check import check_backbones, check_engine
from wemmu.published.identity import is_same
from wemmu.recipes.recipe import Recipe, identities, quantize, ready_to_train, recipe
from wemmu.recipes.staged import Staged, parameters, startable
from wemmu.training.start import begin, copies_of, fill_empty, names_inside
from wemmu.types import LossFn


@dataclass(frozen=True)
class StageParts:
    """What the trainer runs.

    carried: weights that this stage neither trains nor gets from a backbone, by canonical name; its checkpoints hold
    them. frozen: backbone -> identity of its loaded weights. adapters, copied: as `wemmu.checkpoint.manifest.Origin`.
    parameters: numbers of trained and of frozen ones in the whole model.
    """

    recipe: Recipe
    engine: Engine
    loader: Loader
    carried: dict[str, Tensor]
    frozen: dict[str, str]
    adapters: dict[str, float]
    copied: dict[str, str]
    kernels: Kernels
    parameters: tuple[int, int]


def build(run: StageRun, topology: Topology = ALONE, device: torch.device | str = "cpu") -> StageParts:
    """Load, freeze, start from the previous stage's weights, and connect.

    Raises:
        BackboneError: if a backbone cannot be loaded whole, or the engine cannot divide the DiT.
        CheckpointError: if `stage.start` lacks a module that this stage needs or holds something unknown.
        ShardError: if the data set cannot be read or stores latents of another autoencoder.
        ValueError: if the recipe asks for layers that a backbone lacks; if layers are to be compiled and there is no
            compiler; or if the environment forbids cuBLAS to be deterministic.
    """
    if run.kernels.deterministic:
        kernels.make_deterministic()
    check_engine(run.backbones, run.recipe.backbones, run.parallel.engine)
    check_shapes(run)
    device = torch.device(device)
    made = recipe(run, place_blocks(run, device), device)
    ready_to_train(made, run)
    chosen, compiled = give_kernels(run, made.model, device)
    counted = parameters(made.model)
    # The names, before an engine takes the model apart.
    names = [name for name, _ in made.model.named_parameters()]
    trained = {name for name, parameter in made.model.named_parameters() if parameter.requires_grad}
    started = names_inside(run, startable(made.model).keys())
    # On the host, where weights are full, as far as nothing else comes into them.
    quantize(run, made.model, but=started)
    resting = startable(made.model).keys() - trained
    empty = {name for name, parameter in made.model.named_parameters() if parameter.is_meta}
    for part in run.memory.offload:
        cast(Offloadable, made.model.get_submodule(part)).offloaded = True
    engine = make_engine(run, made.model, made.loss, topology, device, chosen.adamw == "Apex", compiled)
    if empty:
        fill_empty(made, engine, empty)
    carried = begin(run, made, engine, resting, started)
    quantize(run, made.model)
    loader = Loader(run, made.encoder, made.token_px, topology.rank, topology.world)
    if made.vae is not None:
        check_latents(loader.settings, made.vae, identities(made)["vae"])
    # A backbone that an earlier stage or this one trains no longer has the identity of its directory.
    frozen = {
        backbone: sha256
        for backbone, sha256 in identities(made).items()
        if not trained | started >= {name for name in names if name.startswith(f"{backbone}.")}
    }
    saved = tuple(trained | carried.keys())
    return StageParts(
        recipe=made,
        engine=engine,
        loader=loader,
        carried=carried,
        frozen=frozen,
        adapters={
            prefix: scale for prefix, scale in made.model.scales.items()
            if any(name.startswith(prefix) and is_adapter(name) for name in saved)
        },
        copied={
            prefix: backbone for prefix, backbone in copies_of(run, made).items()
            if not any(name.startswith(prefix) and not is_adapter(name) for name in saved)
        },
        kernels=chosen,
        parameters=counted,
    )  # fmt: skip


def check_shapes(run: StageRun) -> None:
    """Build the model without weights, so that targets of adapters or layers that it lacks are refused at once.

    Raises:
        BackboneError, ValueError: as `build`.
    """
    check_backbones(run.backbones, run.recipe.backbones)
    with init_empty_weights():
        make_model(run)


def give_kernels(run: StageRun, model: Staged, device: torch.device) -> tuple[Kernels, Sequence[nn.Module]]:
    """Choose the kernels and give them to the VLM's norms and to the layers; return those that are compiled, too.

    All ranks must call it; they take the same kernels. Raises ValueError as `wemmu.kernels.choose`.
    """
    config = (language := model.normed()[0]).config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dtype = getattr(torch, run.backbones.dtype)
    chosen = kernels.choose(run.kernels, run.parallel.engine, device, dtype, head_dim, all_ranks().answers)
    if chosen.narrow:
        narrow(model)
    if chosen.channels_last and isinstance(model.vae, FrozenVAE):
        model.vae.channels_last()
    layers = model.compilable() if chosen.compiled else ()
    kernels.apply(chosen, type(language.norm), model.normed(), layers)
    return chosen, layers


def make_engine(
    run: StageRun,
    model: nn.Module,
    loss: LossFn,
    topology: Topology,
    device: torch.device,
    apex: bool = False,
    compiled: Sequence[nn.Module] = (),
) -> Engine:
    """apex: see `wemmu.parallel.adamw.AdamW`; compiled: the layers that are, see `wemmu.kernels.apply`."""
    match run.parallel.engine:
        case "single":
            return SingleEngine(model.to(device), loss, run, apex)
        # Their libraries are slow to import.
        case "zero3":
            from wemmu.parallel.zero3 import Zero3Engine

            return Zero3Engine(model, loss, run, topology, device, compiled)
        case "hybrid":
            from wemmu.parallel.hybrid import HybridEngine, LossInParts

            assert isinstance(loss, LossInParts), "the config has hybrid for recipes with such a loss only"
            return HybridEngine(model, loss, run, topology, device, apex)


def place_blocks(run: StageRun, device: torch.device) -> OnBlockLoaded | None:
    """Return what to do with each block of the model when it has its weights; see `wemmu.backbones.weights`."""
    if run.parallel.engine == "single":
        return keep_local
    if run.parallel.engine == "hybrid":
        return None
    from wemmu.parallel.zero3 import shard

    def place(_: str, block: nn.Module) -> None:
        shard(block, device)
        trim()

    return place


def load_trained(
    run: StageRun, checkpoint: Path, ema: bool | None = None, device: torch.device | str = "cpu"
) -> Recipe:
    """Return the recipe with a checkpoint of this stage, for sampling: no engine, no data, no training.

    ema: whether to use the moving averages; None: if the stage keeps them.

    Raises:
        CheckpointError: as `start_from`.
    """
    made = recipe(run, device=device)
    start_from(checkpoint, startable(made.model), identities(made), run.stage.averages(ema), scales=made.model.scales)
    made.model.requires_grad_(False).eval().to(device)
    return made


def check_latents(streams: Iterable[StreamSettings], vae: FrozenVAE, sha256: str) -> None:
    """Refuse stored latents that are not what `vae`, whose weights have this SHA-256, makes of the same images.

    Raises:
        ShardError: naming each property that differs, as it is stored and as it is here.
    """
    for stream in streams:
        if stream.latents is None:
            continue
        here = {
            "vae": sha256,
            "scaling_factor": vae.scaling_factor,
            "channels": vae.latent_channels,
            "rows": stream.height / vae.latent_px,
            "columns": stream.width / vae.latent_px,
        }
        stored = stream.latents.model_dump()
        if is_same(stored["vae"], sha256):
            here["vae"] = stored["vae"]
        if wrong := [
            f"{name}: {stored[name]} stored, {value} here" for name, value in here.items() if stored[name] != value
        ]:
            raise ShardError(
                f"the latents stored in {stream.name} are not of this stage's autoencoder ({'; '.join(wrong)}); write "
                "the data set anew into an empty directory, with this autoencoder or without data.prepare.latents"
            )
