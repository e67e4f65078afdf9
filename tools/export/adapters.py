"""The adapters of a checkpoint as folders of peft, one for each module, for the stock classes of the backbones.

    DIT, SanaTransformer2DModel             PeftModel.from_pretrained(dit, DIR/dit), pipe.load_lora_weights(DIR/dit)
    LLM, e.g. Qwen2_5_VLForConditional...   PeftModel.from_pretrained(vlm, DIR/llm)
    PATHWAY, the VLM's language model       PeftModel.from_pretrained(vlm.model.language_model, DIR/pathway)

The pathway is a copy of the language model's layers, so its adapters have the names that fit these.
"""

import json
from pathlib import Path

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from wemmu.checkpoint.adapters import is_adapter
from wemmu.checkpoint.collective import CheckpointError
from wemmu.checkpoint.manifest import read_manifest, some
from wemmu.checkpoint.stored import StoredTensors
from wemmu.config import StageRun
from wemmu.config.checkpoints import no_adapters
from wemmu.published.known import TRANSFORMER
from wemmu.recipes.uae.config import UAE

# The name that diffusers looks for.
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"


def write_adapters(run: StageRun, checkpoint: Path, directory: Path, ema: bool) -> list[str]:
    """Write the adapters of a checkpoint into the empty `directory`; return a line for each module.

    ema: whether their moving averages.

    Raises:
        CheckpointError: if the checkpoint is damaged, holds no adapters, or holds other weights of an adapted module.
    """
    weights = StoredTensors(checkpoint, ema)
    lines = []
    for module, (prefix, *_) in run.recipe.modules.items():
        if (scale := weights.manifest.adapters.get(prefix)) is None:
            continue
        # A backbone's stock class has the names behind the field's; a copy's are the whole prefix behind.
        backbone = prefix.partition(".")[0]
        root = f"{backbone}." if backbone in run.recipe.backbones else prefix
        inside = [name for name in weights.manifest.tensors if name.startswith(prefix)]
        if whole := [name for name in inside if not is_adapter(name)]:
            raise CheckpointError(
                f"{checkpoint} holds other weights of {module} beside its adapters ({some(whole)}), which a folder of "
                "adapters cannot contain; `wemmu export RUN --out DIR` writes whole weights"
            )
        tensors = {name.removeprefix(root): weights.read(name).contiguous() for name in inside}
        base = _base(run, prefix)
        _write(directory / module, tensors, scale, base, diffusers=module == TRANSFORMER)
        layers = len(tensors) // 2
        lines.append(f"{module}: {layers} layers, for {base}")
    if not lines:
        raise CheckpointError(no_adapters(checkpoint))
    return lines


def _base(run: StageRun, prefix: str) -> Path:
    """Return the directory of the weights that the adapters of a module are for."""
    backbone = prefix.partition(".")[0]
    if not isinstance(run.recipe, UAE) or backbone != "generator":
        found: Path = getattr(run.backbones, run.recipe.copies.get(prefix, backbone))
        return found
    assert run.backbones.dit is not None, "the recipe uae has one"
    weights = run.recipe.generator.weights
    return weights if any(name.startswith("dit.") for name in read_manifest(weights).tensors) else run.backbones.dit


def _write(directory: Path, tensors: dict[str, Tensor], scale: float, base: Path, diffusers: bool) -> None:
    layers = sorted({name.rpartition(".lora_")[0] for name in tensors})
    rank = next(len(tensor) for name, tensor in tensors.items() if name.endswith(".lora_A.weight"))
    alpha = scale * rank
    # peft and diffusers declare a whole number and take any.
    config = LoraConfig(
        r=rank, lora_alpha=int(alpha) if alpha.is_integer() else alpha, target_modules=layers,  # type: ignore[arg-type]
        base_model_name_or_path=str(base), inference_mode=True,
    )  # fmt: skip
    directory.mkdir()
    config.save_pretrained(str(directory))
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, directory / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    if diffusers:
        # Sets among the fields become lists, as in peft's own file.
        description = json.dumps(
            {f"transformer.{field}": value for field, value in config.to_dict().items()}, default=sorted
        )
        named = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
        save_file(
            named, directory / DIFFUSERS_WEIGHTS, metadata={"format": "pt", LORA_ADAPTER_METADATA_KEY: description}
        )
