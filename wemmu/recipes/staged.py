"""The base class of models that stages train."""

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from wemmu.checkpoint.adapters import is_adapter

if TYPE_CHECKING:
    from wemmu.recipes.lora import Adapted


class Staged(nn.Module):
    """A model whose modules a stage can name in `trains`.

    prefixes: name of such a module -> how the canonical names of its weights begin. sharded: its children that hold all
    that stages can train, which engines may shard. adapters: those of its modules that learn by adapters
    (`wemmu.recipes.lora`).
    """

    prefixes: Mapping[str, tuple[str, ...]]
    sharded: tuple[str, ...]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.adapters: dict[str, Adapted] = {}

    @abstractmethod
    def checkpoint_activations(self) -> None:
        """Recompute activations of the layers that run with gradients in the backward pass."""

    @abstractmethod
    def normed(self) -> tuple[Any, ...]:
        """Return what gets kernels of norms, first the language model: its sizes decide which kernels fit."""

    @abstractmethod
    def compilable(self) -> tuple[nn.Module, ...]:
        """Return the modules to compile, trained and frozen, layer by layer. Who calls it compiles them."""

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield parameters by their canonical names, in which adapters change no name of a weight."""
        named = super().named_parameters(prefix, recurse, remove_duplicate)
        if not self.adapters:
            yield from named
            return
        for name, parameter in named:
            # Frozen adapters beside those that learn: what a stage began with, which nothing saves.
            if ".reference." not in name:
                yield re.sub(r"\.lora_([AB])\.default\.", r".lora_\1.", name.replace(".base_layer.", ".")), parameter

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return the parameter of a canonical name."""
        layer, _, last = target.rpartition(".")
        if is_adapter(target):
            return super().get_parameter(f"{layer}.default.{last}")
        adapted = any(layer in one.layers for one in self.adapters.values())
        return super().get_parameter(f"{layer}.base_layer.{last}" if adapted else target)

    @property
    def scales(self) -> dict[str, float]:
        """How the names of adapted layers begin -> alpha / rank of their adapters."""
        return {adapted.prefix: adapted.scale for adapted in self.adapters.values()}

    def freeze_all_but(self, trains: tuple[str, ...]) -> None:
        """Set requires_grad so that exactly the parameters of the modules in `trains` learn, or their adapters."""
        whole = tuple(prefix for name in trains if name not in self.adapters for prefix in self.prefixes[name])
        adapted = tuple(self.adapters[name].prefix for name in trains if name in self.adapters)
        self.requires_grad_(False)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(whole) or (is_adapter(name) and name.startswith(adapted)))

    def ready_to_train(self, trains: tuple[str, ...], checkpointing: bool) -> None:
        """Go into training mode with exactly the modules in `trains` learning, and activations recomputed or kept."""
        self.freeze_all_but(trains)
        self.train()
        if checkpointing:
            self.checkpoint_activations()


def parameters(model: nn.Module) -> tuple[int, int]:
    """Return how many numbers of the whole model learn, and how many are frozen."""
    counts = [0, 0]
    for parameter in model.parameters():
        # DeepSpeed's shards remember it.
        counts[not parameter.requires_grad] += getattr(parameter, "ds_numel", parameter.numel())
    return counts[0], counts[1]


def startable(model: Staged) -> dict[str, Tensor]:
    """Return the live weights that a stage can train, by canonical name."""
    prefixes = tuple(prefix for of_module in model.prefixes.values() for prefix in of_module)
    return {name: p.detach() for name, p in model.named_parameters() if name.startswith(prefixes)}
