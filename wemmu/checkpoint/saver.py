"""Saves checkpoints during training: the step waits for a copy in host memory, a thread writes it."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from wemmu.checkpoint import retention, store
from wemmu.checkpoint.collective import own_group
from wemmu.checkpoint.manifest import Origin
from wemmu.checkpoint.sharded_tensor import ShardedTensor
from wemmu.checkpoint.state import TrainState


class Saver:
    """Writes checkpoints under `root` in the background, one at a time, and keeps the newest `keep` of them.

    All ranks create one and make the same calls. The next call raises an error of the background, on all ranks.
    """

    def __init__(self, root: Path, keep: int, origin: Origin):
        """Remove the remains of killed saves under `root`; no other process may save there."""
        self._root, self._keep, self._origin = root, keep, origin
        # The thread must not share a group with the training.
        self._ranks = own_group()
        self._ranks.together(f"{root} cannot be cleared", lambda: None, lambda _: retention.clear_debris(root))
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._copies: dict[str, list[Tensor]] = {}

    def save(self, state: TrainState, carried: Mapping[str, Tensor]) -> None:
        """Start saving; `state` may change as soon as this returns, `carried` may not.

        Raises:
            CheckpointError: if the previous save failed.
        """
        self.wait()
        tensors = store.flat(state, carried) | self._copied(store.flat(state, {}))
        self._writing = self._thread.submit(self._write, tensors, state.steps)

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
            CheckpointError: if writing failed.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait for the last save, then end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _copied(self, live: dict[str, ShardedTensor]) -> dict[str, ShardedTensor]:
        """Return the copies in host memory, reused by every save; the previous writer has finished."""
        copied = {}
        for name, tensor in live.items():
            parts = [part for _, part in tensor.parts]
            if name not in self._copies:
                self._copies[name] = [torch.empty(p.shape, dtype=p.dtype, pin_memory=p.is_cuda) for p in parts]
            for copy, part in zip(self._copies[name], parts, strict=True):
                copy.copy_(part, non_blocking=True)
            offsets = (offset for offset, _ in tensor.parts)
            copied[name] = ShardedTensor(tensor.shape, list(zip(offsets, self._copies[name], strict=True)))
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copied

    def _write(self, tensors: dict[str, ShardedTensor], step: int) -> None:
        store.write(self._root, tensors, step, self._origin, self._ranks)
        retention.prune(self._root, self._keep, self._ranks, step)
