"""Writes the folders in which the backbones are published: their files, names of tensors, indexes and leftovers.

`python -m tests.published.replicas OUT` writes all at full size, as headers in front of holes: they take no disk, and
every name and shape is there. With a model that has numbers the same functions write folders that can be loaded.
"""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from wemmu.checkpoint.stream import _header
from wemmu.published.configs import CONFIGS

VLM_FILE, DIT_FILE = "model.safetensors", "diffusion_pytorch_model.safetensors"
PUBLISHED_VLM = (("model.language_model.", "model."), ("model.visual.", "visual."))
# A file that runs code when it is unpickled, as `.bin` and `.pth` files can.
PICKLE = b"cposix\nsystem\n(S'touch UNPICKLED'\ntR."
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3968658944\n"
DPM_SOLVER = {
    "_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", "flow_shift": 3.0,
    "num_train_timesteps": 1000, "prediction_type": "flow_prediction", "solver_order": 2, "use_flow_sigmas": True,
}  # fmt: skip


def write_json(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2))


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; of tensors on the meta device only the header, in front of a hole of their size."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not any(tensor.is_meta for tensor in tensors.values()):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
        return
    header = _header(tensors, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()})
    with file.open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + sum(tensor.nbytes for tensor in tensors.values()))


def write_shards(directory: Path, single: str, tensors: Mapping[str, Tensor], count: int) -> None:
    """Write `count` files of about the same size, in the order of the names, with an index."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    files: list[dict[str, Tensor]] = [{} for _ in range(count)]
    done = 0
    for name, tensor in tensors.items():
        files[min(count * done // total, count - 1)][name] = tensor
        done += tensor.nbytes
    stem, suffix = single.rsplit(".", 1)
    names = [f"{stem}-{number + 1:05d}-of-{count:05d}.{suffix}" for number in range(count)]
    for file, held in zip(names, files, strict=True):
        write_tensors(directory / file, held)
    mapped = {name: file for file, held in zip(names, files, strict=True) for name in held}
    write_json(directory / f"{single}.index.json", {"metadata": {"total_size": total}, "weight_map": mapped})


def leftovers(directory: Path) -> None:
    """Add what else lies in published folders: notes, other formats, pickles, weights that git-lfs left."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    (directory / "README.md").write_text("---\nlicense: other\n---\n# A model\n")
    for name in ("pytorch_model.bin", "consolidated.00.pth", "optimizer.pt"):
        (directory / name).write_bytes(PICKLE)
    write_json(directory / "pytorch_model.bin.index.json", {"weight_map": {"odd": "pytorch_model.bin"}})
    (directory / "model.gguf").write_text(POINTER)
    save_file({"adapter": torch.zeros(3)}, directory / "adapter_model.safetensors")


def weights(model: nn.Module, dtype: torch.dtype, tied: bool = False) -> dict[str, Tensor]:
    """Return the parameters of a model, without the head that shares the embedding's if they are `tied`."""
    state = {name: tensor.detach().to(dtype) for name, tensor in model.state_dict().items()}
    return {name: tensor for name, tensor in state.items() if not (tied and name == "lm_head.weight")}


def qwen2_5_vl(directory: Path, vlm: Any, config: dict[str, Any], processor: Path, shards: int = 2) -> None:
    """Write a VLM as Qwen2.5-VL-3B-Instruct is published: flat config, old names of tensors, an index.

    config: the flat config.json. processor: a directory with the processor's files.
    """
    published = {}
    for name, tensor in weights(vlm, torch.bfloat16, config["tie_word_embeddings"]).items():
        long, short = next(((a, b) for a, b in PUBLISHED_VLM if name.startswith(a)), ("", ""))
        published[short + name.removeprefix(long)] = tensor
    write_shards(directory, VLM_FILE, dict(sorted(published.items())), shards)
    write_json(directory / "config.json", config | {"torch_dtype": "bfloat16", "transformers_version": "4.41.2"})
    write_processor(directory, processor, "Qwen2_5_VLProcessor")
    leftovers(directory)


def qwen3_vl(directory: Path, vlm: Any, config: dict[str, Any], processor: Path) -> None:
    """Write a VLM as Qwen3-VL-2B-Instruct is published: nested config, names as in memory, one file."""
    state = weights(vlm, torch.bfloat16, config["tie_word_embeddings"])
    write_tensors(directory / VLM_FILE, dict(sorted(state.items())))
    text = config["text_config"] | {"dtype": "bfloat16"}
    write_json(directory / "config.json", config | {"text_config": text, "transformers_version": "4.57.0.dev0"})
    write_processor(directory, processor, "Qwen3VLProcessor")
    leftovers(directory)


def write_processor(directory: Path, source: Path, processor_class: str) -> None:
    """Copy the tokenizer, and write pixel settings and chat format into the files that are published."""
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"):
        if (source / name).is_file():
            shutil.copy(source / name, directory / name)
    pixels = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (source / name).is_file():
            held = json.loads((source / name).read_text())
            pixels = held.get("image_processor", held) | pixels
    kept = ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std")
    size = {"min_pixels": pixels["size"]["shortest_edge"], "max_pixels": pixels["size"]["longest_edge"]}
    settings = {name: pixels[name] for name in kept} | size
    settings |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": processor_class}
    write_json(directory / "preprocessor_config.json", settings)
    template = (source / "chat_template.jinja").read_text()
    write_json(directory / "chat_template.json", {"chat_template": template})


def sana(directory: Path, dit: Any, vae: Any, dtype: torch.dtype = torch.float32) -> None:
    """Write a pipeline as Sana_1600M_1024px_diffusers is published, its variants side by side.

    The variants hold other numbers, so that loading one would show.
    """
    of_dit, of_vae = weights(dit, dtype), weights(vae, dtype)
    write_shards(directory / "transformer", DIT_FILE, of_dit, 2)
    write_tensors(directory / "transformer" / DIT_FILE, of_dit)
    write_tensors(directory / "vae" / DIT_FILE, of_vae)
    for variant, narrow in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        for part, held in (("transformer", of_dit), ("vae", of_vae)):
            other = {name: (tensor if tensor.is_meta else tensor + 1).to(narrow) for name, tensor in held.items()}
            write_tensors(directory / part / DIT_FILE.replace(".safetensors", f".{variant}.safetensors"), other)
    packed = {name: torch.zeros(2, dtype=torch.int8) for name in of_dit}
    save_file(packed, directory / "transformer" / DIT_FILE.replace(".safetensors", ".int4.safetensors"))
    write_json(directory / "transformer" / f"{DIT_FILE}.index.fp16.json", {"weight_map": {"odd": "absent.safetensors"}})
    for part, model in (("transformer", dit), ("vae", vae)):
        config = {name: value for name, value in dict(model.config).items() if name != "_name_or_path"}
        config |= {"_class_name": type(model).__name__, "_diffusers_version": "0.32.0.dev0", "later_field": None}
        write_json(directory / part / "config.json", config)
        (directory / part / "diffusion_pytorch_model.bin").write_bytes(PICKLE)
    write_json(directory / "scheduler" / "scheduler_config.json", DPM_SOLVER)
    write_json(directory / "text_encoder" / "config.json", {"architectures": ["Gemma2Model"], "model_type": "gemma2"})
    (directory / "text_encoder" / "model-00001-of-00002.safetensors").write_text(POINTER)
    parts = {"transformer": type(dit).__name__, "vae": type(vae).__name__, "scheduler": DPM_SOLVER["_class_name"]}
    index = {"_class_name": "SanaPipeline"} | {part: ["diffusers", name] for part, name in parts.items()}
    write_json(directory / "model_index.json", index | {"text_encoder": ["transformers", "Gemma2Model"]})
    leftovers(directory)


def as_hub_cache(directory: Path, root: Path, name: str) -> Path:
    """Move a folder into the layout of the hub's cache: files are links to blobs; returns the snapshot."""
    home = root / f"models--{name.replace('/', '--')}"
    snapshot, blobs = home / "snapshots" / "4f2d7c9", home / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(file for file in directory.rglob("*") if file.is_file())):
        link = snapshot / file.relative_to(directory)
        link.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blob := blobs / f"{number:064x}")
        link.symlink_to(Path(*[".."] * (len(link.relative_to(home).parts) - 1), "blobs", blob.name))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(snapshot.name)
    return snapshot


def full_size(out: Path, name: str, processor: Path) -> Path:
    """Write a published backbone by its name in `wemmu.published.configs`, without numbers; returns its directory."""
    directory = out / name
    if "/" in name:
        pipeline = name.partition("/")[0]
        vae = name.replace("/transformer", "/vae")
        with torch.device("meta"):
            parts = [getattr(diffusers, CONFIGS[n]["_class_name"]).from_config(CONFIGS[n]) for n in (name, vae)]
        sana(out / pipeline, *parts)
        return out / pipeline
    config = CONFIGS[name]
    cls = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        vlm = cls(cls.config_class(**config))
    if config["model_type"] == "qwen2_5_vl":
        qwen2_5_vl(directory, vlm, config, processor, shards=2 if "3B" in name else 5)
    else:
        qwen3_vl(directory, vlm, config, processor)
    return directory


def main(out: str) -> None:
    shapes = Path(__file__).parents[2] / "assets/shapes/vlm"
    for name, config in CONFIGS.items():
        if config.get("_class_name") == "SanaTransformer2DModel" or "VL" in name:
            print(full_size(Path(out), name, shapes))


if __name__ == "__main__":
    main(*sys.argv[1:])
