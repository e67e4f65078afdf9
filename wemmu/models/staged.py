"""What every model that is trained by stages has in common."""

from abc import abstractmethod

from torch import nn

from wemmu.config.stage import Module


class Staged(nn.Module):
    """A model whose parts a stage can name in `trains`."""

    @abstractmethod
    def modules_by_name(self) -> dict[Module, nn.Module]:
        """Those parts; what this configuration lacks is left out."""

    def freeze_all_but(self, trains: tuple[Module, ...]) -> None:
        """Set requires_grad so that exactly the parameters of the modules in `trains` learn."""
        self.requires_grad_(False)
        for name in trains:
            self.modules_by_name()[name].requires_grad_(True)
