"""A tuned VLM as a directory in the published layout, which loads wherever the VLM itself does.

The head that reconstructs is left out: nothing that is asked of the VLM needs it. It stays in the checkpoint.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.export.card import CARD, vlm_card
from tools.export.report import ParityError, Report, compare_component
from tools.export.stored import VLM_FILE, Stored, published, trained, with_adapters, write_component
from wemmu.backbones.full_precision import in_memory
from wemmu.backbones.weights import load_vlm
from wemmu.checkpoint.adapters import is_adapter, to_merge
from wemmu.checkpoint.collective import CheckpointError
from wemmu.checkpoint.manifest import Manifest, some
from wemmu.checkpoint.stored import StoredTensors
from wemmu.config import StageRun
from wemmu.prompts import PromptEncoder
from wemmu.published.identity import identity, is_same, short
from wemmu.recipes.lora import merge
from wemmu.shapes.language import DESCRIBE
from wemmu.training.build import load_trained

# What is said to both models, and how far their logits may be apart for rounding in float32.
SAID = "describe the image"
BOUND = 1e-4
# Formats that published folders hold beside safetensors.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".msgpack", ".h5", ".onnx")


def write_vlm(
    run: StageRun, checkpoint: Path, directory: Path, dtype_name: str, forward: bool, ema: bool, folder: Path | None
) -> list[str]:
    """Write the VLM of a checkpoint of `run` into the empty `directory`; returns the summary of its parity.

    Memory holds one tensor at a time, unless `forward` asks to compare what both models say. ema: whether
    the weights are their moving averages. folder: of the stage, for the card; None: without a card.

    Raises:
        ParityError: if what was written is not the model that was trained.
        CheckpointError, ValueError: if the checkpoint is damaged or not of this VLM.
    """
    dtype, source = getattr(torch, dtype_name), run.backbones.vlm
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    weights = StoredTensors(checkpoint, ema)
    stored = _tuned(published(source, VLM_FILE), weights, checkpoint, source)
    for file in sorted(source.iterdir()):
        if file.is_file() and not _holds_weights(file):
            shutil.copy2(file, directory)
    write_component(directory, VLM_FILE, stored, dtype)
    report = Report.of(weights.manifest, dtype_name, ema)
    report.question = run.recipe.asks_for_captions
    compare_component(report, directory, "vlm", VLM_FILE, stored, dtype)
    if forward:
        report.outputs = _compare_logits(run, checkpoint, directory, dtype, ema)
    else:
        report.outputs = {"compared": False, "lines": ["what both models say was not compared (--no-forward)"]}
    report.write(directory)
    # That of the published model, which this one no longer is.
    (directory / CARD).unlink(missing_ok=True)
    if folder is not None:
        question = run.recipe.asks_for_captions or DESCRIBE
        card = vlm_card(run, folder, weights.manifest, report.lines(), question)
        (directory / CARD).write_text(card, encoding="utf-8")
    return report.lines()


def _holds_weights(file: Path) -> bool:
    """Whether a file holds the weights as they were before, in any format, or is their index."""
    return file.name.startswith(VLM_FILE.split(".")[0]) or file.suffix in WEIGHTS or ".index." in file.name


def _tuned(stored: dict[str, Stored], weights: StoredTensors, checkpoint: Path, source: Path) -> dict[str, Stored]:
    """The published tensors, those that were trained in the place of what they began as."""
    _check_origin(weights.manifest, checkpoint, source)
    begun = {in_memory(name): each for name, each in stored.items()}
    own = trained(weights, "vlm.")
    wrong = {n for n, t in own.items() if not is_adapter(n) and (n not in begun or begun[n].shape != t.shape)}
    if odd := sorted(wrong | to_merge(own, ()).keys() - begun.keys()):
        raise CheckpointError(f"{checkpoint} does not fit {source}, which has no {some(odd)} of that shape")
    tuned = with_adapters(begun, weights, "vlm.")
    return {name: tuned[in_memory(name)] for name in stored}


def _check_origin(manifest: Manifest, checkpoint: Path, source: Path) -> None:
    here, there = identity(source), manifest.frozen.get("vlm", "none")
    if not is_same(there, here):
        raise CheckpointError(
            f"{checkpoint} is of another VLM than {source} (SHA-256 {short(there)}, here {short(here)})"
        )


@torch.no_grad()
def _compare_logits(
    run: StageRun, checkpoint: Path, directory: Path, dtype: torch.dtype, ema: bool
) -> dict[str, object]:
    """Let both models read the same words.

    Raises:
        ParityError: if they differ by more than rounding.
    """
    # The checkpoint's numbers rounded to the type of the export, once, whatever type they were trained in.
    exact = run.changed({"backbones.dtype": "float32"})
    model = load_trained(exact, checkpoint, ema).model
    merge(model)
    original = model.vlm.to(dtype)
    exported, _ = load_vlm(directory, dtype)
    prompts = PromptEncoder(directory).answered([SAID], [SAID], [[]])[0]

    def logits(vlm: Any) -> Tensor:
        return vlm.eval()(input_ids=prompts.input_ids, attention_mask=prompts.mask.long()).logits.float()

    apart = float((logits(original) - logits(exported)).abs().max())
    # Not `apart > BOUND`, which a NaN would pass.
    if not apart <= BOUND:
        raise ParityError(f"the logits of the exported VLM are {apart:.1e} off those of the trained one")
    return {"compared": True, "logits": apart, "lines": [f"the logits of both differ by at most {apart:.1e}"]}
