"""Runs a model in eval mode and restores its mode, so that sampling does not depend on it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

Given = ParamSpec("Given")
Result = TypeVar("Result")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode without gradients; restore each module's mode afterwards.

    In training mode a model is another one: layers of Hugging Face that recompute their activations drop the cache of
    keys and values that they are given, and dropout is on.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def in_eval_mode(method: Callable[Concatenate[Any, Given], Result]) -> Callable[Concatenate[Any, Given], Result]:
    """Wrap a method so that its object's `model` runs as in `evaluating`."""

    @wraps(method)
    def run(self: Any, /, *args: Given.args, **kwargs: Given.kwargs) -> Result:
        with evaluating(self.model):
            return method(self, *args, **kwargs)

    return run
