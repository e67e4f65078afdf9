"""The two things a layer costs: numbers to store, and products for each position that it is applied to."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """parameters: numbers it holds. products: multiply-adds per output position (token, latent or pixel)."""

    parameters: int
    products: int = 0

    def __mul__(self, times: int) -> "Layer":
        """As many such layers, applied one after the other to the same positions."""
        return Layer(self.parameters * times, self.products * times)


def linear(inputs: int, outputs: int, bias: bool = True) -> Layer:
    return conv(inputs, outputs, 1, bias=bias)


def conv(inputs: int, outputs: int, kernel: int, groups: int = 1, bias: bool = True) -> Layer:
    """A square kernel of `kernel`^2; a position is one of the output."""
    weight = inputs * outputs * kernel**2 // groups
    return Layer(weight + bias * outputs, weight)


def vector(numbers: int) -> Layer:
    """A norm's scale, a table: stored, added or multiplied, but in no matrix product."""
    return Layer(numbers)


def total(layers: Iterable[Layer]) -> Layer:
    """All of them, on the same positions, as one."""
    layers = tuple(layers)
    return Layer(sum(layer.parameters for layer in layers), sum(layer.products for layer in layers))
