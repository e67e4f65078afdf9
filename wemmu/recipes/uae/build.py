"""Builds the auto-encoder: the policy from the VLM, and the frozen generator with the weights of the config."""

import hashlib
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoImageProcessor

from wemmu.backbones.vae import FrozenVAE
from wemmu.backbones.vlm import FrozenVLM
from wemmu.backbones.weights import LoadReport, load_vlm
from wemmu.checkpoint.collective import CheckpointError, all_ranks
from wemmu.checkpoint.manifest import read_manifest, sha256_of, some, verify
from wemmu.checkpoint.start import fill_merged, start_from
from wemmu.config.exported import processor_folder
from wemmu.config.objectives import UnifiedGRPO
from wemmu.config.schema import Backbones, StageRun
from wemmu.prompts import PromptEncoder
from wemmu.published.layout import DIFFUSERS, tensors
from wemmu.recipes.lora import adapt, add_reference
from wemmu.recipes.staged import startable
from wemmu.recipes.uae.config import UAE as UAEConfig
from wemmu.recipes.uae.loss import loss_of
from wemmu.recipes.uae.model import UAE
from wemmu.recipes.uae.policy import Policy
from wemmu.recipes.wemmu.bridge import Bridge
from wemmu.recipes.wemmu.build import build_model, caption_channels
from wemmu.recipes.wemmu.model import WeMMU
from wemmu.types import Batch, Losses, LossFn, Rollout

# Of an export, the folder of a component -> the first word of its weights' names in training.
COMPONENTS = {"bridge": "bridge", "transformer": "dit"}
# Names of the frozen copy -> of the policy, whose weights it begins with.
REFERENCE = {"language_model.": "vlm.model.language_model.", "lm_head.": "vlm.lm_head."}


def build_uae(run: StageRun) -> tuple[UAE, dict[str, LoadReport]]:
    """Return the whole model.

    Raises:
        BackboneError: if a backbone cannot be loaded whole.
        CheckpointError: if the generator's weights, or those that the reference begins with, do not fit.
    """
    config, backbones = run.recipe, run.backbones
    assert isinstance(config, UAEConfig)
    generator, reports = build_generator(backbones, config, run.seed)
    vlm, reports["vlm"] = load_vlm(backbones.vlm, getattr(torch, backbones.dtype))
    pixels = AutoImageProcessor.from_pretrained(processor_folder(backbones.vlm), use_fast=True)
    model = UAE(vlm, pixels.image_mean, pixels.image_std, generator, copies_reference(run))
    adapt(model, config, run.seed)
    if penalised(run) and run.stage.start is not None:
        fill_reference(model, config, run.stage.start)
    return model, reports


def penalised(run: StageRun) -> bool:
    """Whether a stage penalises the distance from the policy that it began with."""
    return isinstance(run.stage.objective, UnifiedGRPO) and run.stage.objective.beta > 0


def copies_reference(run: StageRun) -> bool:
    """Whether that policy is a copy of the language model; of one with adapters it is the same with others."""
    return penalised(run) and "llm" not in run.recipe.lora


def build_generator(backbones: Backbones, config: UAEConfig, seed: int) -> tuple[WeMMU, dict[str, LoadReport]]:
    """Return the frozen generator, and reports of its backbones and of itself under `generator`.

    Raises:
        BackboneError, CheckpointError: as `build_uae`.
    """
    source = config.generator.weights
    model, loaded = build_model(backbones, config.generator.bridge, seed)
    if (source / "model_index.json").is_file():
        digest = fill_from_export(model, source)
    else:
        start_from(source, startable(model), {name: report.sha256 for name, report in loaded.items()})
        digest = _digest(read_manifest(source).files)
    parameters = sum(p.numel() for p in model.parameters())
    # Its backbones too: it is another generator with another VLM or autoencoder.
    identity = hashlib.sha256("/".join([digest, *(r.sha256 for r in loaded.values())]).encode()).hexdigest()
    reports = {"vae": loaded["vae"], "generator": LoadReport(str(source), parameters, identity)}
    return model.eval().requires_grad_(False), reports


def fill_from_export(model: WeMMU, directory: Path) -> str:
    """Fill bridge and DiT with those of an exported pipeline; return a hash of them.

    Raises:
        CheckpointError: if they are those of another architecture.
    """
    live, files = startable(model), set()
    for folder, part in COMPONENTS.items():
        own = {name.removeprefix(f"{part}."): t for name, t in live.items() if name.startswith(f"{part}.")}
        stored = {name: tensor.file for name, tensor in tensors(directory / folder, DIFFUSERS).items()}
        if missing := sorted(own.keys() ^ stored.keys()):
            raise CheckpointError(
                f"{directory / folder} is not this generator's: {some(missing)} is in one of them only"
            )
        files |= set(stored.values())
        for name, tensor in own.items():
            with safe_open(stored[name], "pt") as file:
                value = file.get_tensor(name)
            if value.shape != tensor.shape:
                raise CheckpointError(
                    f"{directory}: {part}.{name} has shape {list(value.shape)}, not {list(tensor.shape)}"
                )
            tensor.copy_(value)
    return _digest({str(file.relative_to(directory)): sha256_of(file) for file in files})


def _digest(files: Mapping[str, str]) -> str:
    return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()


def fill_reference(model: UAE, config: UAEConfig, start: Path) -> None:
    """Give the reference what the stage starts with: the frozen copy its weights, or frozen adapters theirs.

    What is not inside is the backbone's already; without adapters inside the reference has none.
    """
    manifest = verify(start, all_ranks())
    if model.reference is None:
        if model.adapters["llm"].prefix in manifest.adapters:
            adapters = {name: p.detach() for name, p in add_reference(model, config, "llm").items()}
            fill_merged(start, manifest, adapters, manifest.tensors)
        return
    renamed = {
        new + name.removeprefix(old): parameter.detach()
        for name, parameter in model.reference.named_parameters()
        for old, new in REFERENCE.items()
        if name.startswith(old)
    }
    fill_merged(start, manifest, renamed, renamed)


def assemble(run: StageRun, vlm: Any, vae: FrozenVAE, dit: nn.Module) -> tuple[UAE, LossFn]:
    """The model and its loss of backbones without weights; see `wemmu.measuring`.

    It is the update that is measured; a rollout and its rendering are not.
    """
    config = run.recipe
    assert isinstance(config, UAEConfig)
    frozen = FrozenVLM(deepcopy(vlm), [0.5] * 3, [0.5] * 3)
    bridge = Bridge(config.generator.bridge, frozen.language_model, vae.latent_channels, caption_channels(dit))
    generator = WeMMU(frozen, vae, bridge.to(vlm.dtype), dit)
    model = UAE(vlm, [0.5] * 3, [0.5] * 3, generator, copies_reference(run))
    return model, Measured(run, model)


class Measured:
    """The loss of a stage on a batch of the data set: of a rollout whose captions are as long as the labels."""

    def __init__(self, run: StageRun, model: UAE):
        assert isinstance(run.recipe, UAEConfig)
        self.objective = run.stage.objective
        # It reads no text, and there may be no tokenizer.
        self.policy = Policy(model, cast(PromptEncoder, None), run.recipe.max_length)
        self.policy.banned = torch.zeros(model.vlm.lm_head.out_features, dtype=torch.bool)
        self.loss = loss_of(self.policy, self.objective)

    def __call__(self, batch: Batch, step: int) -> Losses:
        return self.loss(self._rolled_out(batch) if isinstance(self.objective, UnifiedGRPO) else batch, step)

    def _rolled_out(self, batch: Batch) -> Batch:
        objective, prompts, labels = self.objective, batch.prompts, batch.labels
        assert isinstance(objective, UnifiedGRPO)
        assert labels is not None

        def repeated(tensor: Tensor, dim: int = 0) -> Tensor:
            return tensor.repeat_interleave(objective.group, dim)

        prompts = type(prompts)(
            repeated(prompts.input_ids), repeated(prompts.mask), repeated(prompts.positions, 1),
            repeated(prompts.next_position), prompts.padded,
            tuple(n for n in prompts.image_tokens for _ in range(objective.group)),
        )  # fmt: skip
        labels = repeated(labels)
        zeros = torch.zeros(labels.shape, device=labels.device)
        old, reference = (zeros if kept else None for kept in (objective.updates > 1, objective.beta > 0))
        rollout = Rollout(zeros[:, 0], 1.0, old, reference, {})
        return replace(batch, prompts=prompts, labels=labels, rollout=rollout)
