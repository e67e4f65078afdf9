"""Checks that a directory is a whole backbone; the doctor, the launcher, the plan and all loaders share this."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from wemmu.config.base import leaves
from wemmu.config.exported import processor_folder
from wemmu.config.neighbours import instead
from wemmu.config.schema import Backbones
from wemmu.published.known import AUTOENCODER, ENCODER, KNOWN, MODEL_TYPES, TRANSFORMER, VLM
from wemmu.published.layout import DIFFUSERS, TRANSFORMERS, BackboneError, read_json, refuse_pointer, tensors

# What else a processor or a model reads if it is there.
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json")
FLOATS, INDICES = ("F64", "F32", "F16", "BF16"), ("I64", "I32")
# Files in which the processor looks for the chat format; it ignores one in tokenizer_config.json alone.
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/default.jinja")

# Fields of a config.json that repeat parts of a model, and the side of a DiT's table of positions, in latents.
MOST = 1000
_COUNTS = {True: re.compile("layers|depth|blocks|heads|sample_size"), False: re.compile("layers|depth|blocks|heads")}


def check(directory: Path, kind: str, with_processor: bool = False) -> None:
    """Check that a directory is a whole model of a `kind` ("vlm", "vae", "dit", "encoder").

    with_processor: also check the files that encode a VLM's prompts.

    Raises:
        BackboneError: names every missing or wrong file.
    """
    if found := [*_model(directory, kind), *(_processor(processor_folder(directory)) if with_processor else ())]:
        raise BackboneError("; ".join(found))


def check_backbones(backbones: Backbones, kinds: Sequence[str]) -> None:
    """Raise BackboneError with all of the `problems`."""
    if found := problems(backbones, kinds):
        raise BackboneError("; ".join(found))


def problems(backbones: Backbones, kinds: Sequence[str]) -> list[str]:
    """Return all problems of these kinds of backbones; a sentence each."""
    found: list[str] = []
    given = backbones.directories(kinds)
    for kind, directory in given.items():
        found += _model(directory, kind)
        # A missing directory is one problem.
        found += _processor(processor_folder(directory)) if kind == VLM and directory.is_dir() else []
    if found or not {TRANSFORMER, AUTOENCODER} <= given.keys():
        return found
    return list(_fit(backbones))


def check_engine(backbones: Backbones, kinds: Sequence[str], engine: str) -> None:
    """Check that an engine can train the DiT, if the kinds include one.

    Raises:
        BackboneError: lists the engines that can.
    """
    # A missing directory is another problem.
    if TRANSFORMER not in kinds or backbones.dit is None or not backbones.dit.is_dir():
        return
    file = backbones.dit / "config.json"
    valid = _facts(file, TRANSFORMER).ENGINES
    if engine not in valid:
        raise BackboneError(
            f"engine {engine} cannot divide the {check_class(file, TRANSFORMER)} {backbones.dit}; valid: "
            f"parallel.engine {', '.join(valid)}"
        )


def check_class(file: Path, kind: str, config: Mapping[str, Any] | None = None) -> str:
    """Return the class of `kind` that a config.json describes; config: its content, if not that of `file`.

    Raises:
        BackboneError: if it describes another model or none; lists the known ones.
    """
    config = read_json(file) if config is None else config
    listed = config.get("architectures")
    said = [config.get("_class_name"), config.get("model_type"), *(listed if isinstance(listed, list) else [])]
    # timm: deit3_large_patch16_224 is of the family deit3.
    said.append(str(config.get("architecture") or "").partition("_")[0])
    named = next((name for name in said if name and isinstance(name, str)), "no class of a model")
    named = MODEL_TYPES.get(named, named)
    if named not in KNOWN[kind]:
        raise BackboneError(f"{file} describes {named}; valid choices: {', '.join(KNOWN[kind])}")
    # The libraries build whatever is asked for, which takes minutes or all memory, before shapes can be compared.
    for field, value in leaves(config):
        numbers = value if isinstance(value, list) else [value]
        if _COUNTS[kind == TRANSFORMER].search(field) and any(isinstance(n, int) and n > MOST for n in numbers):
            raise BackboneError(f"{file}: {field} is {value}, and no known model has more than {MOST}; correct it")
    return named


def _model(directory: Path, kind: str) -> Iterator[str]:
    if snapshot := _in_hub_cache(directory):
        yield f"{directory} is in a folder of the hub's cache, which holds the model deeper; name {snapshot}"
        return
    if not directory.is_dir():
        yield f"{directory} is not a directory; it must hold {' or '.join(KNOWN[kind])} in the published layout"
        yield from filter(None, [instead(directory, "backbone").removeprefix("; ")])
        return
    if (directory / "model_index.json").is_file():
        parts = ", ".join(sorted(file.parent.name for file in directory.glob("*/config.json")))
        yield f"{directory} is a whole pipeline; name the {kind} in it, one of its folders {parts}"
        return
    if not (directory / "config.json").is_file() and (clause := instead(directory, "backbone")):
        yield clause.removeprefix("; ")
        return
    single = TRANSFORMERS if kind in (VLM, ENCODER) else DIFFUSERS
    yield from _told(lambda: _check_config(directory / "config.json", kind))
    yield from _told(lambda: _check_dtypes(directory, single))


def _check_dtypes(directory: Path, single: str) -> None:
    for name, tensor in tensors(directory, single).items():
        # Integers under other names are indices, such as of positions.
        if tensor.dtype not in FLOATS and (tensor.dtype not in INDICES or name.endswith(("weight", "bias"))):
            raise BackboneError(
                f"{tensor.file} stores {name} as {tensor.dtype}: quantized or broken; use the weights in bf16 or fp32"
            )


def _in_hub_cache(directory: Path) -> Path | None:
    """Return the snapshot of a cache folder, `models--OWNER--NAME`, or by a part of a pipeline in it."""
    for root, part in ((directory, "."), (directory.parent, directory.name)):
        if (root / "snapshots").is_dir() and (root / "refs").is_dir():
            main = root / "refs" / "main"
            revision = main.read_text(encoding="utf-8").strip() if main.is_file() else "REVISION"
            return root / "snapshots" / revision / part
    return None


def _check_config(file: Path, kind: str) -> None:
    check_class(file, kind)
    config = read_json(file)
    if kind in (AUTOENCODER, TRANSFORMER):
        _latent_channels(file, kind)
    for field in _facts(file, kind).SCALES if kind == AUTOENCODER else ():
        given = config.get(field, 1)
        values = given if isinstance(given, list) else [given]
        if not all(type(value) in (int, float) and 0 < value < float("inf") for value in values):
            raise BackboneError(f"{file}: {field} is {given}; latents are divided by it, so it must be above 0")
    # The libraries put the sizes of some other model, up to 72 B parameters, in the place of a part that is not given.
    # Qwen2.5-VL's published config has the fields of the language model beside the others.
    for part in ("text_config", "vision_config") if kind == VLM else ():
        if not config.get(part) and not (part == "text_config" and config.get("hidden_size")):
            raise BackboneError(f"{file} has no {part}, the sizes of that part of the VLM; download it again")
    if config.get("quantization_config"):
        raise BackboneError(f"{file} has a quantization_config; use the unquantized weights, in bf16 or fp32")


def _processor(directory: Path) -> Iterator[str]:
    yield from _told(lambda: _check_pixels(directory))
    if not (directory / "tokenizer.json").is_file():
        if absent := [name for name in ("vocab.json", "merges.txt") if not (directory / name).is_file()]:
            yield f"{directory} holds no tokenizer: neither tokenizer.json nor {' and '.join(absent)}"
    else:
        yield from _told(lambda: _check_text(directory / "tokenizer.json"))
    for name in SETTINGS:
        if (directory / name).is_file():
            yield from _told(lambda name=name: read_json(directory / name))  # type: ignore[misc]
    templates = [directory / name for name in TEMPLATES if (directory / name).is_file()]
    if not templates:
        yield f"{directory} holds no chat template: none of {', '.join(TEMPLATES)}"
    for template in templates:
        yield from _told(lambda template=template: _check_text(template))  # type: ignore[misc]


def _check_pixels(directory: Path) -> None:
    """Image settings are in a file of their own; transformers 5 writes them into the processor's."""
    inside = directory / "processor_config.json"
    if (directory / "preprocessor_config.json").is_file() or not inside.is_file():
        read_json(directory / "preprocessor_config.json")
    elif not isinstance(read_json(inside).get("image_processor"), dict):
        raise BackboneError(f"{directory} has no preprocessor_config.json, and {inside.name} has no image_processor")


def _check_text(file: Path) -> None:
    with file.open("rb") as stream:
        begin = stream.read(100)
    refuse_pointer(file, begin)
    if not begin.strip():
        raise BackboneError(f"{file} is empty; download it again")
    if file.suffix == ".json" and not begin.lstrip().startswith(b"{"):
        raise BackboneError(f"{file} is not JSON; download it again")


def _fit(backbones: Backbones) -> Iterator[str]:
    dit, vae = backbones.dit, backbones.vae
    assert dit is not None, "it is given"
    assert vae is not None, "it is given"
    takes = _latent_channels(dit / "config.json", TRANSFORMER)
    makes = _latent_channels(vae / "config.json", AUTOENCODER)
    if takes != makes:
        yield f"{dit} takes {takes} channels, the autoencoder {vae} makes {makes}; they belong together"


def _latent_channels(file: Path, kind: str) -> int:
    facts, config = _facts(file, kind), read_json(file)
    try:
        return int(facts.latent_channels(config))
    except (ValueError, TypeError) as error:
        raise BackboneError(f"{file} {error}") from error


def latent_px(vae: Path) -> int:
    """Return the side of a latent of an autoencoder's directory, px."""
    file = vae / "config.json"
    return int(_facts(file, AUTOENCODER).latent_px(read_json(file)))


def _facts(file: Path, kind: str) -> Any:
    """Return the module `published`, free of torch, of the backbone folder for the class in a config.json."""
    return import_module(f"wemmu.backbones.{KNOWN[kind][check_class(file, kind)]}.published")


def _told(read: Callable[[], object]) -> Iterator[str]:
    try:
        read()
    except BackboneError as error:
        yield str(error)
