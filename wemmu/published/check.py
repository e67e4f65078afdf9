"""Checks that a directory is a whole backbone; the doctor, the launcher, the plan and all loaders share this."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from wemmu.config.schema import Backbones
from wemmu.published.known import AUTOENCODER, KNOWN, MODEL_TYPES, TRANSFORMER, VLM
from wemmu.published.layout import DIFFUSERS, TRANSFORMERS, BackboneError, read_json, refuse_pointer, tensors

# Files in which the processor looks for the chat format; it ignores one in tokenizer_config.json alone.
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/default.jinja")


def check(directory: Path, kind: str, with_processor: bool = False) -> None:
    """Check that a directory is a whole model of a `kind` ("vlm", "vae", "dit").

    with_processor: also check the files that encode a VLM's prompts.

    Raises:
        BackboneError: names every missing or wrong file.
    """
    if found := [*_model(directory, kind), *(_processor(directory) if with_processor else ())]:
        raise BackboneError("; ".join(found))


def check_backbones(backbones: Backbones, kinds: Sequence[str]) -> None:
    """Raises BackboneError with all of the `problems`."""
    if found := problems(backbones, kinds):
        raise BackboneError("; ".join(found))


def problems(backbones: Backbones, kinds: Sequence[str]) -> list[str]:
    """Return all problems of these kinds of backbones; a sentence each."""
    found = []
    for kind in kinds:
        directory: Path = getattr(backbones, kind)
        found += _model(directory, kind)
        # A missing directory is one problem.
        found += _processor(directory) if kind == VLM and directory.is_dir() else []
    if found or not {TRANSFORMER, AUTOENCODER} <= set(kinds):
        return found
    return list(_fit(backbones))


def check_class(file: Path, kind: str) -> str:
    """Return the class of `kind` that a config.json describes.

    Raises:
        BackboneError: if it describes another model or none; lists the known ones.
    """
    config = read_json(file)
    named = config.get("_class_name") or MODEL_TYPES.get(config.get("model_type", "")) or config.get("model_type")
    named = named or next(iter(config.get("architectures") or ()), None)
    if named not in KNOWN[kind]:
        raise BackboneError(
            f"{file} describes {named or 'no model by its class'}; known here: {', '.join(KNOWN[kind])}"
        )
    return str(named)


def _model(directory: Path, kind: str) -> Iterator[str]:
    if not directory.is_dir():
        yield f"{directory} is not a directory; it must be a {' or '.join(KNOWN[kind])} in the published layout"
        return
    single = TRANSFORMERS if kind == VLM else DIFFUSERS
    yield from _told(lambda: _check_config(directory / "config.json", kind))
    yield from _told(lambda: tensors(directory, single))


def _check_config(file: Path, kind: str) -> None:
    check_class(file, kind)
    config = read_json(file)
    if config.get("guidance_embeds"):
        raise BackboneError(
            f"{file} has guidance_embeds: a Sana-Sprint, distilled to few steps, needs the guidance as an input, which "
            "this training does not give; use a Sana without it, as Sana_1600M_1024px_diffusers"
        )
    if "quantization_config" in config:
        raise BackboneError(f"{file} has a quantization_config; use the unquantized weights, in bf16 or fp32")


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


def _fit(backbones: Backbones) -> Iterator[str]:
    dit, vae = (read_json(folder / "config.json") for folder in (backbones.dit, backbones.vae) if folder is not None)
    # The libraries' own defaults.
    inputs, latents = dit.get("in_channels", 32), vae.get("latent_channels", 32)
    if inputs != latents:
        yield (
            f"{backbones.dit} takes {inputs} channels, the autoencoder {backbones.vae} makes {latents}; they belong "
            "together"
        )


def _told(read: Callable[[], object]) -> Iterator[str]:
    try:
        read()
    except BackboneError as error:
        yield str(error)
