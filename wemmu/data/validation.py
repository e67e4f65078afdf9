"""Batches of the records that are held out of all training."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from wemmu.config import StageRun
from wemmu.data.collate import collate
from wemmu.data.streams import open_held_out, shares
from wemmu.prompts import PromptEncoder
from wemmu.types import Batch


class HeldOut:
    """The held-out records of a stage's mixture at its resolution, always the same and in the same order.

    Args:
        run: the stage's config.
        encoder: writes the prompts.
        token_px: pixels of one VLM token's side.
        part, parts: read this part of `parts` equal parts of each stream.

    `weights` are those of the streams, and add up to one: the mixture's, divided within a task by numbers of samples.

    Raises:
        ShardError: as `Loader` does, or if a task of the mixture has no stream that is large enough.
    """

    def __init__(self, run: StageRun, encoder: PromptEncoder, token_px: int, part: int = 0, parts: int = 1):
        stage = run.stage
        self._streams = open_held_out(run.data, stage.mixture, stage.resolution)
        of_mixture = shares([stream for stream, _ in self._streams], stage.mixture)
        self.weights = [share / sum(of_mixture) for share in of_mixture]
        self._micro, _ = run.memory.micro_batch_at(stage.resolution, stage.global_batch, run.parallel.ranks)
        self._encoder, self._token_px, self._part, self._parts = encoder, token_px, part, parts

    def batches(self) -> Iterator[tuple[int, Batch, Tensor]]:
        """Yield the number of the stream, a micro-batch [B], and which of its samples count, bool [B].

        Every part has as many batches of the same sizes, for ranks that go through them together: what does not divide
        evenly is filled up with samples that do not count.
        """
        for number, (stream, positions) in enumerate(self._streams):
            each = -(-len(positions) // self._parts)
            places = self._part * each + np.arange(each)
            for begin in range(0, each, self._micro):
                mine = places[begin : begin + self._micro]
                samples = [stream[index] for index in positions[mine % len(positions)]]
                batch = collate(stream.settings, samples, self._encoder, self._token_px)
                yield number, batch, torch.from_numpy(mine < len(positions))
