"""A fake world that measures FLOPs and memory of each part of a model, forward and backward."""

from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from wemmu.measuring.fake_world import FakeWorld, Traffic

# Parts of a VLM, by a name on a module's path.
_INSIDE_VLM = {"visual": "vision", "language_model": "language", "lm_head": "language"}


class PartNames:
    """Names the part of a model that a path belongs to: one that a stage can train, or a frozen one."""

    def __init__(self, modules: Mapping[str, Sequence[str]]):
        """modules: see `wemmu.config.recipe.RecipeConfig`."""
        self._prefixes = {prefix: name for name, prefixes in modules.items() for prefix in prefixes}

    def __getitem__(self, path: str) -> str:
        if known := [prefix for prefix in self._prefixes if f"{path}.".startswith(prefix)]:
            return self._prefixes[max(known, key=len)]
        first, *names = path.split(".")
        # Another VLM within a frozen part belongs to that part.
        return next((part for name, part in _INSIDE_VLM.items() if first == "vlm" and name in names), first)


class Observed(FakeWorld):
    """A fake world with separate counts for each part of a model.

    flops_of: (part, forward | backward | again) -> FLOPs; `again` is what checkpointing computes a second time. peaks:
    (part, forward | backward) -> most bytes beyond `base` that there were at one time while the part was computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops_of: Counter[tuple[str, str]] = Counter()
        self.peaks: Counter[tuple[str, str]] = Counter()
        self._stack, self._phase = ["rest"], "forward"
        self.start()

    def start(self) -> None:
        """Forget what was seen; from here on only what comes on top counts."""
        self.flops_of.clear()
        self.peaks.clear()
        self.traffic = Traffic()
        self.base, self._there = self.alive, set(self.storages())
        # Autograd numbers its nodes as it makes them: where each part begins.
        self._numbers, self._parts = [0], ["rest"]

    def kept(self) -> dict[str, int]:
        """Return the bytes that were allocated since `start` and still exist, by the part that allocated them."""
        found: Counter[str] = Counter()
        for key, (size, part) in self.storages().items():
            if key not in self._there:
                found[part or "rest"] += size
        return dict(found)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before, (self.purpose, self._phase) = self.flops, self._now()
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.flops > before:
            self.flops_of[self.purpose, self._phase] += self.flops - before
        return out

    def _grow(self, size: int) -> None:
        super()._grow(size)
        key = (self.purpose or "rest", "forward" if self._phase == "forward" else "backward")
        self.peaks[key] = max(self.peaks[key], self.alive - self.base)

    def _now(self) -> tuple[str, str]:
        """The part and the phase that are being computed."""
        node = torch._C._current_autograd_node()
        if node is None:
            return self._stack[-1], "forward"
        part = self._parts[bisect(self._numbers, node._sequence_nr()) - 1]
        # Formulas of the backward pass run without gradients, what is computed again with them.
        return part, "again" if torch.is_grad_enabled() else "backward"

    def _enter(self, part: str | None) -> None:
        if torch._C._current_autograd_node() is not None:
            return
        self._stack.append(part) if part else self._stack.pop()
        self._numbers.append(torch._C._autograd._get_sequence_nr())
        self._parts.append(self._stack[-1])

    @contextmanager
    def watching(self, model: nn.Module, parts: PartNames) -> Iterator[None]:
        """Know which part is being computed, by hooks on the upper modules of `model`."""
        handles = []
        for path, module in model.named_modules():
            if path and path.count(".") < 4:
                handles += [
                    module.register_forward_pre_hook(lambda *_, part=parts[path]: self._enter(part)),
                    module.register_forward_hook(lambda *_: self._enter(None), always_call=True),
                ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
