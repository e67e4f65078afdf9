"""The one place where everything meets: a stage's config becomes a model, an engine, a loader and an objective."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wemmu.config.schema import StageRun
from wemmu.config.shards import ShardError, StreamSettings
from wemmu.data.loader import Loader
from wemmu.models.model import WeMMU
from wemmu.models.vae import FrozenVAE
from wemmu.models.weights import LoadReport, build_model
from wemmu.parallel.engine import Engine
from wemmu.parallel.single import SingleEngine
from wemmu.parallel.topology import ALONE, Topology
from wemmu.prompts import PromptEncoder
from wemmu.sampling.sampler import Sampler
from wemmu.training.checkpoint import CheckpointError, load_weights
from wemmu.training.losses import FlowMatchingLoss
from wemmu.training.manifest import Manifest, some


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


def build(run: StageRun, topology: Topology = ALONE, device: torch.device | str = "cpu") -> Parts:
    """Load, freeze, start from the weights of the stage before, and connect.

    Raises:
        CheckpointError: if `stage.start` lacks a module that this stage needs or holds something unknown.
        ShardError: if the data set cannot be read or stores latents of another autoencoder.
    """
    model, reports = build_model(run.backbones, run.bridge, run.seed)
    identities = _identities(reports)
    started = start_from(model, run.stage.start, identities) if run.stage.start else frozenset()
    model.freeze_all_but(run.stage.trains)
    model.train()
    model.vae.cache.capacity = model.vlm.cache.capacity = run.memory.cached_pictures
    # A DiT that an earlier stage trained, or that this one does, is no longer the backbone of that name.
    if "dit" in run.stage.trains or any(name.startswith("dit.") for name in started):
        del identities["dit"]
    encoder = PromptEncoder(run.backbones.vlm)
    loader = Loader(run, encoder, model.vlm.token_px, topology.rank, topology.world)
    check_latents(loader.settings, model.vae, identities["vae"])
    return Parts(
        model=model,
        engine=_engine(run, model, topology, device),
        loader=loader,
        sampler=Sampler(model, encoder, run.stage.objective.time.shift_at(run.stage.resolution)),
        carried={
            name: parameter.detach()
            for name, parameter in model.named_parameters()
            if not parameter.requires_grad and (name.startswith("bridge.") or name in started)
        },
        frozen=identities,
        reports=reports,
    )


def _engine(run: StageRun, model: WeMMU, topology: Topology, device: torch.device | str) -> Engine:
    loss = FlowMatchingLoss(model, run)
    match run.parallel.engine:
        case "single":
            return SingleEngine(model.to(device), loss, run.stage.optimizer, run.stage.global_batch)
        # Their libraries are slow to import.
        case "zero3":
            from wemmu.parallel.zero3 import Zero3Engine

            return Zero3Engine(model, loss, run, topology, torch.device(device))
        case "hybrid":
            from wemmu.parallel.hybrid import HybridEngine

            return HybridEngine(model, loss, run, topology, torch.device(device))


def load_trained(run: StageRun, checkpoint: Path) -> tuple[WeMMU, PromptEncoder]:
    """The model as a checkpoint of this stage left it, for sampling: no engine, no data, nothing learns."""
    model, reports = build_model(run.backbones, run.bridge, run.seed)
    start_from(model, checkpoint, _identities(reports))
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


@torch.no_grad()
def start_from(model: WeMMU, source: Path, identities: dict[str, str]) -> frozenset[str]:
    """Copy the weights of a checkpoint into the model; returns their names.

    The bridge must be inside whole. A DiT that is not inside was frozen when the checkpoint was made, so it must have
    been the very DiT that is loaded now.

    Raises:
        CheckpointError: naming the tensors that are missing or unknown, or the frozen part that differs.
    """
    weights, manifest = load_weights(source)
    parameters = dict(model.named_parameters())
    needed = {n for n in parameters if n.startswith("bridge.")}
    if "dit" not in manifest.frozen:
        needed |= {n for n in parameters if n.startswith("dit.")}
    missing, unknown = sorted(needed - weights.keys()), sorted(weights.keys() - parameters.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{source} does not fit this stage: it lacks {some(missing)} and holds unknown {some(unknown)}. Was it "
            "trained with another bridge (queries.design, vae_branch)?"
        )
    _same_frozen(source, manifest, identities)
    for name, weight in weights.items():
        if parameters[name].shape != weight.shape:
            raise CheckpointError(
                f"{source}: {name} has shape {list(weight.shape)}, not {list(parameters[name].shape)}"
            )
    for name, weight in weights.items():
        parameters[name].copy_(weight)
    return frozenset(weights)


def _same_frozen(source: Path, manifest: Manifest, identities: dict[str, str]) -> None:
    for part, sha256 in manifest.frozen.items():
        if identities[part] != sha256:
            raise CheckpointError(
                f"{source} was trained beside another {part} (SHA-256 {sha256[:12]}, here {identities[part][:12]})"
            )
