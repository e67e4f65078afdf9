"""One interface per kind of backbone; the adapter of a family is chosen by the model's class.

An adapter has no weights and no state; its methods take the model. Only adapters name classes, fields and call
signatures of transformers and diffusers.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from wemmu.backbones.vision_tower import Grid, Known, prepare
from wemmu.checkpoint.sharded_tensor import TensorSlice
from wemmu.published.check import check_class
from wemmu.published.known import KNOWN


class VLMAdapter(ABC):
    """A VLM whose language model takes a cache of Hugging Face's protocol, at `model.language_model` of the model.

    finds_seams: whether the language model, without a mask and a cache, takes tokens whose positions do not count up
    for the beginnings of packed sequences. Those of images do not.
    """

    model_class: type[nn.Module]
    finds_seams = False

    def prepare(self, vlm: Any) -> None:
        """Let the vision tower take a `Grid`, before `vision` is called."""
        prepare(vlm.model.visual, self.tower)

    def vision(self, vlm: Any, patches: Tensor, grid: Grid) -> Tensor:
        """Encode patches of images of one size (see `wemmu.backbones.patches`): [all tokens, F] for `inputs`."""
        features: Tensor = vlm.model.visual(patches, grid)
        return features

    @abstractmethod
    def tower(self, visual: Any, patches: Tensor, grid: Grid, known: Known) -> Tensor:
        """Run the tower: patches -> [images * merged tokens, F]."""

    @abstractmethod
    def inputs(self, embeds: Tensor, at_images: Tensor, vision: Tensor) -> dict[str, Any]:
        """Return the language model's arguments: embeddings [B, L, D] with `vision` [B * N, tokens, F] inserted.

        at_images: bool [B, L].
        """


class AutoencoderAdapter(ABC):
    """An autoencoder whose latents are a grid. facts: the module `published` beside the adapter."""

    model_class: type[nn.Module]
    facts: Any

    def geometry(self, vae: Any) -> tuple[int, int]:
        """Return (latent channels, px along one side of a latent)."""
        return self.facts.latent_channels(vae.config), self.facts.latent_px(vae.config)

    def scaling_factor(self, vae: Any) -> float:
        factor: float = vae.config["scaling_factor"]
        return factor

    @abstractmethod
    def encode(self, vae: Any, x: Tensor) -> Tensor:
        """Encode pixels [B, 3, H, W] in [-1, 1] as latents [B, C, h, w] of about unit variance, deterministically."""

    @abstractmethod
    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Decode latents: the inverse of `encode`."""

    def compilable(self, vae: Any) -> tuple[nn.Module, ...]:
        """Return the modules of its encoder that torch.compile can take."""
        return (vae.encoder,)


class DiTStage(Protocol):
    """Successive blocks of a DiT: one rank's part of a pipeline. Its parameters are those of its blocks.

    canonical: parameter here -> its name in the whole DiT. activations: see `wemmu.parallel.pipeline`.
    """

    is_first: bool
    is_last: bool
    blocks: nn.ModuleList

    def __call__(self, inputs: tuple[Tensor, ...], latents: Sequence[int]) -> Any: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def canonical(self, name: str) -> str: ...
    def split(self, group: ProcessGroup) -> dict[str, TensorSlice]: ...
    def activations(self, x_t: Tensor, states: Tensor) -> tuple[Tensor, ...]: ...


class DiTAdapter(Protocol):
    """A diffusion transformer with its blocks in `transformer_blocks`.

    input_weight: name of the weight that the channels of x_t enter by, along its second dimension.
    """

    model_class: type[nn.Module]
    input_weight: str

    def caption_channels(self, dit: nn.Module) -> int:
        """Return the number of channels of the condition's states."""

    def latent_channels(self, dit: nn.Module) -> int:
        """Return the number of channels of x_t, including those of source latents."""

    def widen(self, dit: nn.Module) -> None:
        """Let the DiT take as many channels again behind those of x_t: double `input_weight`, in place, by zeros.

        Raises:
            BackboneError: if this family cannot.
        """

    def velocity(self, dit: nn.Module, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """Compute v_theta(x_t, t, y) in the DiT's dtype: x_t [B, C, h, w], t [B] with 1 = noise, states [B, Q, C_y]."""

    def stage(self, dit: nn.Module, stage: int, stages: int) -> DiTStage:
        """Return one of `stages` successive parts and remove all other modules from `dit`.

        Raises:
            ValueError: if the DiT cannot be divided so, or this family not at all.
        """


def adapter_of(model: nn.Module) -> Any:
    """Return the adapter of a loaded backbone.

    Raises:
        ValueError: for a class that no adapter knows, with those that are known.
    """
    return _adapter(type(model).__name__)


def class_of(directory: Path, kind: str) -> type[nn.Module]:
    """Return the class that the config.json of a directory names; kind: "vlm", "vae" or "dit".

    Raises:
        BackboneError: for a class that is not known.
    """
    return _adapter(check_class(directory / "config.json", kind)).model_class


def _adapter(name: str) -> Any:
    folders = {cls: folder for classes in KNOWN.values() for cls, folder in classes.items()}
    if name not in folders:
        raise ValueError(f"no adapter knows the class {name}; known: {', '.join(folders)}")
    return import_module(f"wemmu.backbones.{folders[name]}.adapter").ADAPTER
