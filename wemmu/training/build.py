"""The one place where everything meets: a stage's config becomes a model, an engine, a loader and an objective."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wemmu import kernels
from wemmu.config.schema import StageRun
from wemmu.config.shards import ShardError, StreamSettings
from wemmu.data.loader import Loader
from wemmu.kernels import Kernels
from wemmu.models.model import WeMMU
from wemmu.models.vae import FrozenVAE
from wemmu.models.weights import LoadReport, Place, build_model, stay
from wemmu.parallel.engine import Engine
from wemmu.parallel.single import SingleEngine
from wemmu.parallel.topology import ALONE, Topology
from wemmu.prompts import PromptEncoder
from wemmu.sampling.sampler import Sampler
from wemmu.training.losses import FlowMatchingLoss
from wemmu.training.start import start_from, startable


@dataclass(frozen=True)
class Parts:
    """What the trainer runs.

    carried: weights that this stage does not train but that are no backbone's either, by canonical name: they go into
    its checkpoints. frozen: backbone -> SHA-256 of the weights it was loaded with.
    """

    model: WeMMU
    engine: Engine
    loader: Loader
    sampler: Sampler
    carried: dict[str, Tensor]
    frozen: dict[str, str]
    reports: list[LoadReport]
    kernels: Kernels


def build(run: StageRun, topology: Topology = ALONE, device: torch.device | str = "cpu") -> Parts:
    """Load, freeze, start from the weights of the stage before, and connect.

    Raises:
        CheckpointError: if `stage.start` lacks a module that this stage needs or holds something unknown.
        ShardError: if the data set cannot be read or stores latents of another autoencoder.
        ValueError: if layers are to be compiled and there is no compiler.
    """
    model, reports = build_model(run.backbones, run.bridge, run.seed, _place(run, device))
    identities = _identities(reports)
    model.freeze_all_but(run.stage.trains)
    model.train()
    model.vae.cache.capacity = model.vlm.cache.capacity = run.memory.cached_pictures
    if run.memory.checkpointing:
        model.checkpoint_activations()
    chosen = _kernels(run, model, torch.device(device))
    # The names, before an engine takes the model apart.
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    resting = startable(model).keys() - trained
    engine = _engine(run, model, topology, device, chosen.adamw == "Apex")
    started = frozenset()
    if run.stage.start:
        held = engine.held(resting) | engine.state().weights
        started = start_from(run.stage.start, held, identities)
        engine.restored(0)
    # A DiT that an earlier stage trained, or that this one does, is no longer the backbone of that name.
    if "dit" in run.stage.trains or any(name.startswith("dit.") for name in started):
        del identities["dit"]
    encoder = PromptEncoder(run.backbones.vlm)
    loader = Loader(run, encoder, model.vlm.token_px, topology.rank, topology.world)
    check_latents(loader.settings, model.vae, identities["vae"])
    carried = {name for name in resting if name.startswith("bridge.") or name in started}
    return Parts(
        model=model,
        engine=engine,
        loader=loader,
        sampler=Sampler(model, encoder, run.stage.objective.time.shift_at(run.stage.resolution), device=device),
        carried=engine.held(carried),
        frozen=identities,
        reports=reports,
        kernels=chosen,
    )


def _kernels(run: StageRun, model: WeMMU, device: torch.device) -> Kernels:
    """Choose the kernels and give them to the layers that a stage runs with gradients, and to the VLM's norms."""
    language = model.vlm.language_model
    head_dim = language.config.hidden_size // language.config.num_attention_heads
    chosen = kernels.choose(run.kernels, run.parallel.engine, device, getattr(torch, run.backbones.dtype), head_dim)
    layers = [*model.bridge.pathway.layers, *model.dit.transformer_blocks]
    kernels.apply(chosen, type(language.norm), [language, model.bridge.pathway], layers)
    return chosen


def _engine(run: StageRun, model: WeMMU, topology: Topology, device: torch.device | str, apex: bool) -> Engine:
    loss = FlowMatchingLoss(model, run)
    match run.parallel.engine:
        case "single":
            return SingleEngine(model.to(device), loss, run.stage.optimizer, run.stage.global_batch, apex)
        # Their libraries are slow to import.
        case "zero3":
            from wemmu.parallel.zero3 import Zero3Engine

            return Zero3Engine(model, loss, run, topology, torch.device(device))
        case "hybrid":
            from wemmu.parallel.hybrid import HybridEngine

            return HybridEngine(model, loss, run, topology, torch.device(device), apex)


def _place(run: StageRun, device: torch.device | str) -> Place:
    """What becomes of each block of the model as soon as it has its weights."""
    if run.parallel.engine != "zero3":
        return stay
    from wemmu.parallel.zero3 import shard

    return lambda _, block: shard(block, torch.device(device))


def load_trained(run: StageRun, checkpoint: Path) -> tuple[WeMMU, PromptEncoder]:
    """The model as a checkpoint of this stage left it, for sampling: no engine, no data, nothing learns."""
    model, reports = build_model(run.backbones, run.bridge, run.seed)
    start_from(checkpoint, startable(model), _identities(reports))
    return model.requires_grad_(False).eval(), PromptEncoder(run.backbones.vlm)


def _identities(reports: list[LoadReport]) -> dict[str, str]:
    vlm, vae, dit = (report.sha256 for report in reports)
    return {"vlm": vlm, "vae": vae, "dit": dit}


def check_latents(streams: Iterable[StreamSettings], vae: FrozenVAE, sha256: str) -> None:
    """Refuse stored latents that are not what `vae`, whose weights have this SHA-256, makes of the same pictures.

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
        if wrong := [
            f"{name}: {stored[name]} stored, {value} here" for name, value in here.items() if stored[name] != value
        ]:
            raise ShardError(
                f"the latents stored in {stream.name} are not of this stage's autoencoder ({'; '.join(wrong)}); write "
                "the data set anew into an empty directory, with this autoencoder or without data.prepare.latents"
            )
