"""The pipeline directory: components, index, card; written tensor by tensor, then read again and compared."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from transformers import AutoProcessor

from tools.export.card import CARD, pipeline_card, stages_until
from tools.export.parity import compare_outputs
from tools.export.report import Report, compare_component
from tools.export.skeleton import identities, shapes, skeleton
from tools.export.stored import (
    DIFFUSERS_FILE,
    VLM_FILE,
    Stored,
    check_names,
    published,
    with_adapters,
    write_component,
)
from wemmu.backbones.full_precision import LANGUAGE, in_memory
from wemmu.checkpoint.exported import COMPONENTS
from wemmu.checkpoint.start import check_fits
from wemmu.checkpoint.stored import StoredTensors
from wemmu.config import StageRun
from wemmu.config.exported import ARGUMENTS, processor_folder
from wemmu.pipeline import WeMMUPipeline, write_entry
from wemmu.recipes.wemmu.component import WeMMUBridge
from wemmu.recipes.wemmu.config import FlowMatching
from wemmu.recipes.wemmu.config import WeMMU as Recipe
from wemmu.recipes.wemmu.model import WeMMU


@dataclass(frozen=True)
class Choices:
    """dtype: name of the type in which weights are stored. forward: whether both models draw the fixed requests. ema:
    whether the weights are their moving averages."""

    dtype: str
    without_vlm: bool
    forward: bool
    ema: bool


def write_pipeline(run: StageRun, folder: Path, checkpoint: Path, directory: Path, choices: Choices) -> list[str]:
    """Write a checkpoint of the stage `run` in `folder` into the empty `directory`; returns the summary of its parity.

    Memory holds one tensor at a time, unless `choices.forward` asks for what no comparison of files can tell.

    Raises:
        ParityError: if what was written is not the model that was trained.
        CheckpointError, ValueError: if the checkpoint or a backbone cannot be loaded whole.
    """
    dtype = getattr(torch, choices.dtype)
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    model, weights = skeleton(run), StoredTensors(checkpoint, choices.ema)
    assert isinstance(model, WeMMU), "`export_of` says so"
    manifest = weights.manifest
    check_fits(checkpoint, manifest, shapes(model), identities(run))
    resolutions = sorted({stage.stage.resolution for stage in stages_until(run, folder)})
    pipe = _pipeline(run, model, choices.without_vlm, resolutions)
    stored = _components(run, pipe, weights)
    for name, tensors in stored.items():
        write_component(directory / name, _file_of(name), tensors, dtype)
    _write_configs(pipe, directory, dtype)
    report = Report.of(manifest, choices.dtype, choices.ema)
    for name, tensors in stored.items():
        compare_component(report, directory / name, name, _file_of(name), tensors, dtype)
    if choices.forward:
        report.outputs = compare_outputs(run, checkpoint, directory, dtype, choices.without_vlm, choices.ema)
    else:
        said = "the images of both models were not compared (--no-forward)"
        report.outputs = {"compared": False, "lines": [said]}
    report.write(directory)
    (directory / CARD).write_text(
        pipeline_card(run, folder, manifest, report.lines(), choices.without_vlm), encoding="utf-8"
    )
    return report.lines()


def _file_of(component: str) -> str:
    return VLM_FILE if component == "vlm" else DIFFUSERS_FILE


def _components(run: StageRun, pipe: WeMMUPipeline, weights: StoredTensors) -> dict[str, dict[str, Stored]]:
    """Component -> its tensors, by their names in a published file."""
    assert run.backbones.vae is not None, "the recipe wemmu has one"
    found = {"vae": published(run.backbones.vae, DIFFUSERS_FILE)}
    for word, part in COMPONENTS.items():
        original = published(getattr(run.backbones, word), DIFFUSERS_FILE) if word in run.recipe.backbones else {}
        found[part] = with_adapters(original | _copies(run, weights, f"{word}."), weights, f"{word}.")
    for name, tensors in found.items():
        check_names(pipe.components[name], tensors, name)
    if pipe.vlm is not None:
        # Checked when the skeleton was made: names in its files are not those in memory.
        found["vlm"] = published(run.backbones.vlm, VLM_FILE)
    return found


def _copies(run: StageRun, weights: StoredTensors, word: str) -> dict[str, Stored]:
    """The tensors that the checkpoint leaves out as copies of the VLM's, by their names after `word`."""
    found = {}
    for prefix, backbone in weights.manifest.copied.items():
        assert backbone == "vlm", "nothing is copied of another"
        if prefix.startswith(word):
            inside = prefix.removeprefix(word)
            for name, each in published(run.backbones.vlm, VLM_FILE).items():
                memory = in_memory(name)
                # The copy does not contain the vocabulary.
                if memory.startswith(LANGUAGE) and not memory.startswith(f"{LANGUAGE}embed_tokens."):
                    found[inside + memory.removeprefix(LANGUAGE)] = each
    return found


def _pipeline(run: StageRun, model: WeMMU, without_vlm: bool, resolutions: list[int]) -> WeMMUPipeline:
    """The model without memory as a pipeline, for its configs."""
    sampling, stage, recipe, objective = run.sampling, run.stage, run.recipe, run.stage.objective
    assert isinstance(recipe, Recipe)
    assert isinstance(objective, FlowMatching)
    pipe = WeMMUPipeline(
        vlm=model.vlm.vlm,
        processor=AutoProcessor.from_pretrained(processor_folder(run.backbones.vlm), use_fast=True),
        transformer=model.dit,
        vae=model.vae.vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=objective.time.shift_at(stage.resolution)),
        bridge=WeMMUBridge.of(model, recipe.bridge),
        resolution=stage.resolution,
        resolutions=resolutions,
        world=run.world,
        max_aspect=run.data.max_aspect,
        **{argument: getattr(sampling, field) for field, argument in ARGUMENTS.items()},
    )
    if without_vlm:
        pipe.vlm = None
    return pipe


def _write_configs(pipe: WeMMUPipeline, directory: Path, dtype: torch.dtype) -> None:
    """Write everything but weights."""
    pipe.save_config(directory)
    for name in ("vae", *COMPONENTS.values()):
        pipe.components[name].save_config(directory / name)
    for name in ("processor", "scheduler"):
        pipe.components[name].save_pretrained(directory / name)
    if pipe.vlm is not None:
        config = pipe.vlm.config
        config.dtype, config.architectures = str(dtype).removeprefix("torch."), [type(pipe.vlm).__name__]
        config.save_pretrained(directory / "vlm")
        pipe.vlm.generation_config.save_pretrained(directory / "vlm")
    write_entry(directory)
