"""What a directory lacks to be a backbone: the one answer of the doctor, the launcher, the plan and all that load."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from wemmu.config.schema import Backbones
from wemmu.published.layout import DIFFUSERS, TRANSFORMERS, BackboneError, read_json, refuse_pointer, tensors

VLM, TRANSFORMER, AUTOENCODER = "Qwen2_5_VLForConditionalGeneration", "SanaTransformer2DModel", "AutoencoderDC"
# What transformers writes into every config.json -> the class; older ones name it under `architectures`, too.
_MODEL_TYPES = {"qwen2_5_vl": VLM}
# Where the processor looks for the chat format; one in tokenizer_config.json alone it does not see.
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/default.jinja")


def check(directory: Path, kind: str, with_processor: bool = False) -> None:
    """Refuse a directory that is no whole model of class `kind`; with_processor: with what makes its prompts, too.

    Raises:
        BackboneError: naming every file that is missing or wrong.
    """
    if found := [*_model(directory, kind), *(_processor(directory) if with_processor else ())]:
        raise BackboneError("; ".join(found))


def check_backbones(backbones: Backbones, with_dit: bool = True) -> None:
    """Raises BackboneError with all of the `problems`."""
    if found := problems(backbones, with_dit):
        raise BackboneError("; ".join(found))


def problems(backbones: Backbones, with_dit: bool = True) -> list[str]:
    """All that is wrong with a VLM, an autoencoder and, unless a run has no use for it, a DiT; a sentence each."""
    found = [*_model(backbones.vlm, VLM)]
    # Of a directory that is not there nothing more need be said.
    found += _processor(backbones.vlm) if backbones.vlm.is_dir() else []
    found += _model(backbones.sana / "vae", AUTOENCODER)
    if not with_dit:
        return found
    found += _model(backbones.sana / "transformer", TRANSFORMER)
    return found or list(_fit(backbones.sana))


def check_class(file: Path, kind: str) -> dict[str, Any]:
    """The content of a config.json of class `kind`.

    Raises:
        BackboneError: if it describes another model, or none at all, naming what it would have to describe.
    """
    config = read_json(file)
    named = config.get("_class_name") or _MODEL_TYPES.get(config.get("model_type", "")) or config.get("model_type")
    named = named or next(iter(config.get("architectures") or ()), None)
    if named != kind:
        raise BackboneError(f"{file} describes {named or 'no model by its class'}; known here: {kind}")
    return config


def _model(directory: Path, kind: str) -> Iterator[str]:
    if not directory.is_dir():
        yield f"{directory} is not a directory; it must be a {kind} in the published layout"
        return
    single = TRANSFORMERS if kind == VLM else DIFFUSERS
    yield from _told(lambda: _check_config(directory / "config.json", kind))
    yield from _told(lambda: tensors(directory, single))


def _check_config(file: Path, kind: str) -> None:
    config = check_class(file, kind)
    if config.get("guidance_embeds"):
        raise BackboneError(
            f"{file} has guidance_embeds: a Sana-Sprint, distilled to few steps, wants the guidance as an input that "
            "this training does not give; take a Sana without, as Sana_1600M_1024px_diffusers"
        )
    if "quantization_config" in config:
        raise BackboneError(f"{file} has a quantization_config; take the weights as they were before, in bf16 or fp32")


def _processor(directory: Path) -> Iterator[str]:
    yield from _told(lambda: read_json(directory / "preprocessor_config.json"))
    if not (directory / "tokenizer.json").is_file():
        if absent := [name for name in ("vocab.json", "merges.txt") if not (directory / name).is_file()]:
            yield f"{directory} holds no tokenizer: neither tokenizer.json nor {' and '.join(absent)}"
    else:
        yield from _told(lambda: _check_text(directory / "tokenizer.json"))
    templates = [directory / name for name in TEMPLATES if (directory / name).is_file()]
    if not templates:
        yield f"{directory} holds no chat template: none of {', '.join(TEMPLATES)}"
    for template in templates:
        yield from _told(lambda template=template: _check_text(template))  # type: ignore[misc]


def _check_text(file: Path) -> None:
    with file.open("rb") as stream:
        begin = stream.read(100)
    refuse_pointer(file, begin)
    if not begin.strip():
        raise BackboneError(f"{file} is empty; download it again")


def _fit(sana: Path) -> Iterator[str]:
    dit, vae = (read_json(sana / part / "config.json") for part in ("transformer", "vae"))
    # The libraries' own defaults.
    inputs, latents = dit.get("in_channels", 32), vae.get("latent_channels", 32)
    if inputs != latents:
        yield f"{sana}: its transformer takes {inputs} channels, its autoencoder makes {latents}; they belong together"


def _told(read: Callable[[], object]) -> Iterator[str]:
    try:
        read()
    except BackboneError as error:
        yield str(error)
