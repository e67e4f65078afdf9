"""Loads backbones from directories in the published layout: strictly, with a report.

What can be trained, the DiT and the bridge's copy of the VLM's layers, gets its weights block by block, and each block
is handed to `on_block_loaded` before the next one is read: a sharded engine never has the whole of it in memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from wemmu.backbones.adapters import DiTAdapter, adapter_of, class_of
from wemmu.backbones.full_precision import in_memory, with_zeros
from wemmu.backbones.vae import FrozenVAE
from wemmu.backbones.versions import vlm_config
from wemmu.published.check import check
from wemmu.published.identity import identity, short
from wemmu.published.known import AUTOENCODER, TRANSFORMER, VLM
from wemmu.published.layout import DIFFUSERS, TRANSFORMERS, BackboneError, tensors

# Called with a module that has just got its weights and the prefix of their names in the whole model. A module comes
# after its children, which have already been placed. None in its place leaves all blocks on the meta device, for an
# engine that takes the model apart first and then reads only what this rank keeps.
OnBlockLoaded = Callable[[str, nn.Module], object]


@dataclass(frozen=True)
class LoadReport:
    """The result of loading one directory: number of parameters, missing and unexpected names, identity of the weights.

    sha256: its `wemmu.published.identity`.
    """

    source: str
    parameters: int
    sha256: str
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.source}: {self.parameters / 1e6:.2f} M parameters, {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected, sha256 {short(self.sha256)}"
        )


def keep_local(prefix: str, module: nn.Module) -> None:
    """Keep the whole module: the `OnBlockLoaded` of a process that does not shard."""


def load_vlm(directory: Path, dtype: torch.dtype) -> tuple[nn.Module, LoadReport]:
    """Load a VLM.

    Raises:
        BackboneError: if the directory is not in the published layout; names what is missing. Also as `load_strict`.
    """
    # Or transformers would allocate and fill a model of wrong sizes before it says so.
    cls = type(vlm_without_weights(directory))
    return load_strict(cls, directory, dtype, config=vlm_config(cls, directory))


def vlm_without_weights(directory: Path) -> nn.Module:
    """Return the VLM of a directory on the meta device, once names and shapes of its stored weights fit; reads headers.

    Raises:
        BackboneError: as `load_vlm`.
    """
    check(directory, VLM)
    cls = class_of(directory, VLM)
    with made_of(directory, cls.__name__):
        with init_empty_weights():
            model: Any = cls(vlm_config(cls, directory))
        # Not within `init_empty_weights`, which gives each name a parameter of its own.
        model.tie_weights()
        if (directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(directory)
    stored = {in_memory(name): tensor.shape for name, tensor in tensors(directory, TRANSFORMERS).items()}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # The head may share the weights of the embedding.
    optional = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    if odd := sorted(n for n in stored.keys() | expected.keys() - optional if stored.get(n) != expected.get(n)):
        raise BackboneError(
            f"{directory} does not have exactly the tensors of its config; the first differences: {', '.join(odd[:5])}"
        )
    return model


def load_autoencoder(directory: Path, dtype: torch.dtype) -> tuple[FrozenVAE, LoadReport]:
    """Load a frozen autoencoder; raises as `load_vlm`."""
    check(directory, AUTOENCODER)
    vae, report = load_strict(class_of(directory, AUTOENCODER), directory, dtype)
    return FrozenVAE(vae), report


def load_dit(
    directory: Path,
    dtype: torch.dtype,
    on_block_loaded: OnBlockLoaded | None = keep_local,
    source_latents: bool = False,
) -> tuple[nn.Module, LoadReport]:
    """Load a DiT block by block, all of which is checked before the first weight is read; raises as `load_vlm`.

    `on_block_loaded` gets names that begin with `dit.`; without it no weight is read: they stay on the meta device.
    source_latents: whether it takes the latents of a source image behind x_t's; see `DiTAdapter.widen`.
    """
    check(directory, TRANSFORMER)
    cls: Any = class_of(directory, TRANSFORMER)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with made_of(directory, cls.__name__), init_empty_weights():
            model = cls.from_config(cls.load_config(directory))
    finally:
        torch.set_default_dtype(default)
    model.register_to_config(_name_or_path=directory)
    stored = tensors(directory, DIFFUSERS)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    adapter: DiTAdapter = adapter_of(model)
    widened = adapter.input_weight if source_latents else None
    if source_latents:
        adapter.widen(model)
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    report = _report(
        directory,
        sum(p.numel() for p in model.parameters()),
        expected.keys() - shapes.keys(),
        shapes.keys() - expected.keys(),
        [name for name, shape in shapes.items() if name in expected and shape != expected[name]],
    )
    if on_block_loaded is None:
        return model.eval(), report
    for prefix, block in blocks(model):
        empty = [name for name, tensor in block.state_dict().items() if tensor.is_meta]
        found = {name: _read(stored[prefix + name].file, prefix + name, dtype) for name in empty}
        fill(block, {name: with_zeros(t) if prefix + name == widened else t for name, t in found.items()})
        on_block_loaded(f"dit.{prefix}", block)
    return model.eval(), report


def fill(block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a block on the meta device its missing weights, by name."""
    block.load_state_dict(tensors, strict=False, assign=True)
    assert not any(tensor.is_meta for tensor in block.state_dict().values())


def load_strict(
    cls: type[Any], directory: Path, dtype: torch.dtype, unused: tuple[str, ...] = (), **options: Any
) -> tuple[nn.Module, LoadReport]:
    """Load a model of transformers or diffusers from safetensors.

    unused: prefixes of the names of weights that the directory may hold and this class does not have.
    options: of `from_pretrained`.

    Raises:
        BackboneError: if a weight is missing, unexpected or misshapen; nothing is initialised at random.
    """
    if issubclass(cls, PreTrainedModel):
        # With ignore_mismatched_sizes transformers reports the name of a misshapen weight; otherwise it only raises.
        options |= {"dtype": dtype, "ignore_mismatched_sizes": True}
    else:
        options |= {"torch_dtype": dtype}
    with made_of(directory, cls.__name__):
        model, info = cls.from_pretrained(directory, output_loading_info=True, use_safetensors=True, **options)
    parameters = sum(p.numel() for p in model.parameters())
    mismatched = list(map(str, info["mismatched_keys"]))
    unexpected = [name for name in info["unexpected_keys"] if not name.startswith(unused)]
    return model, _report(directory, parameters, info["missing_keys"], unexpected, mismatched)


@contextmanager
def made_of(directory: Path, model: str) -> Iterator[None]:
    """Name the directory in the library's error if its files do not describe a model."""
    try:
        yield
    # The libraries check next to nothing: a field that is wrong ends in whatever it is used for.
    except Exception as error:
        if isinstance(error, BackboneError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise BackboneError(f"{directory} cannot be loaded as {model}: {type(error).__name__}: {error}") from error


def _read(file: Path, name: str, dtype: torch.dtype) -> Tensor:
    # Opened for each: pages that a broadcast has written to stay this rank's own until the file is closed.
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name).to(dtype)


def blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return parts of a model by prefix, which together hold all of its weights: list elements and other children.

    The model itself comes last, with the prefix "", for weights outside of its children.
    """
    for name, child in model.named_children():
        parts = child.named_children() if isinstance(child, nn.ModuleList) else [("", child)]
        yield from ((".".join(filter(None, (name, part))) + ".", block) for part, block in parts)
    yield "", model


def _report(
    directory: Path, parameters: int, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[str]
) -> LoadReport:
    """Raise BackboneError unless the weights fit."""
    report = LoadReport(str(directory), parameters, identity(directory), sorted(missing), sorted(unexpected))
    if problems := sorted([*report.missing, *report.unexpected, *mismatched]):
        raise BackboneError(f"{report}; first of them: {', '.join(problems[:5])}")
    return report
