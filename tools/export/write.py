"""The pipeline directory: components, index, card; written, then loaded again and compared."""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from tools.export.card import model_card
from tools.export.parity import (
    Inventory,
    compare_pictures,
    compare_tensors,
    components,
    draw_exported,
    draw_trained,
)
from wemmu.config import StageRun
from wemmu.models.component import WeMMUBridge
from wemmu.models.model import WeMMU
from wemmu.pipeline import WeMMUPipeline
from wemmu.training.build import load_trained
from wemmu.training.manifest import read_manifest

PIPELINE_FILE = '''\
"""Where diffusers finds the pipeline when it is told custom_pipeline; the wemmu package must be installed."""

from wemmu.pipeline import WeMMUPipeline

__all__ = ["WeMMUPipeline"]
'''


def write_pipeline(
    run: StageRun, folder: Path, checkpoint: Path, directory: Path, dtype_name: str, without_vlm: bool
) -> list[str]:
    """Write a checkpoint of the stage `run` in `folder` into the empty `directory`; returns the report of its parity.

    Raises:
        ParityError: if what was written is not the model that was trained.
        CheckpointError, ValueError: if the checkpoint or a backbone cannot be loaded whole.
    """
    dtype = getattr(torch, dtype_name)
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    # Whatever the stage computed in, its weights are float32, and so is the comparison.
    run = run.model_copy(update={"backbones": run.backbones.model_copy(update={"dtype": "float32"})})
    model, encoder = load_trained(run, checkpoint)
    trained = draw_trained(model, encoder, run)
    _round(model, dtype)
    rounded = draw_trained(model, encoder, run) if dtype != torch.float32 else trained
    inventories = {name: Inventory.of(component) for name, component in components(model).items()}
    _pipeline(run, model, dtype, without_vlm).save_pretrained(directory)
    (directory / "pipeline.py").write_text(PIPELINE_FILE)
    # Two models are never in memory at a time.
    del model, encoder
    given = {}
    if without_vlm:
        del inventories["vlm"]
        given["vlm"] = Qwen2_5_VLForConditionalGeneration.from_pretrained(run.backbones.vlm)
        _round(given["vlm"], dtype)
    report = compare_tensors(directory, inventories)
    exported = draw_exported(WeMMUPipeline.from_pretrained(directory, **given))
    report += compare_pictures(exported, rounded, trained)
    card = model_card(run, folder, read_manifest(checkpoint), report, without_vlm)
    (directory / "README.md").write_text(card)
    return report


@torch.no_grad()
def _round(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give every parameter the values it will have after being stored in `dtype`."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def _pipeline(run: StageRun, model: WeMMU, dtype: torch.dtype, without_vlm: bool) -> WeMMUPipeline:
    """The trained model as a pipeline in memory; its modules are cast to `dtype` in place."""
    sampling, stage = run.sampling, run.stage
    pipe = WeMMUPipeline(
        vlm=model.vlm.vlm.to(dtype),
        processor=AutoProcessor.from_pretrained(run.backbones.vlm, use_fast=True),
        transformer=model.dit.to(dtype),
        vae=model.vae.vae.to(dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=stage.objective.time.shift_at(stage.resolution)),
        bridge=WeMMUBridge.of(model, run.bridge).to(dtype),
        resolution=stage.resolution,
        num_inference_steps=sampling.steps,
        t2i_guidance_scale=sampling.t2i,
        image_guidance_scale=sampling.image,
        instruction_guidance_scale=sampling.instruction,
        multi_guidance_scale=sampling.multi,
    )
    if without_vlm:
        pipe.vlm = None
    return pipe
