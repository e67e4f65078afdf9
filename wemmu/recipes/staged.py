"""The base class of models that stages train."""

from abc import abstractmethod

from torch import Tensor, nn


class Staged(nn.Module):
    """A model whose parts a stage can name in `trains`.

    sharded: its children that hold all that stages can train, which engines may shard.
    """

    sharded: tuple[str, ...]

    @abstractmethod
    def modules_by_name(self) -> dict[str, nn.Module]:
        """Return those parts; without parts that this configuration lacks."""

    @abstractmethod
    def checkpoint_activations(self) -> None:
        """Recompute activations of the layers that run with gradients in the backward pass."""

    def freeze_all_but(self, trains: tuple[str, ...]) -> None:
        """Set requires_grad so that exactly the parameters of the modules in `trains` learn."""
        self.requires_grad_(False)
        for name in trains:
            self.modules_by_name()[name].requires_grad_(True)

    def ready_to_train(self, trains: tuple[str, ...], checkpointing: bool) -> None:
        """Go into training mode with exactly the modules in `trains` learning, and activations recomputed or kept."""
        self.freeze_all_but(trains)
        self.train()
        if checkpointing:
            self.checkpoint_activations()


def startable(model: Staged) -> dict[str, Tensor]:
    """Return the live weights that a stage can train, by canonical name."""
    modules = model.modules_by_name().values()
    chosen = {id(parameter) for module in modules for parameter in module.parameters()}
    return {name: p.detach() for name, p in model.named_parameters() if id(p) in chosen}
