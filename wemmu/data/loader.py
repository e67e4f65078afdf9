"""The micro-batches of an optimizer step, for one rank."""

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from wemmu.config import StageRun
from wemmu.config.shards import ShardError, StreamSettings
from wemmu.data.collate import collate, sample_id
from wemmu.data.mixture import Order, schedule
from wemmu.data.shards import DecodedRecord, ShardStream, stacked
from wemmu.data.streams import open_streams, shares
from wemmu.prompts import PromptEncoder
from wemmu.types import Batch, Negatives


class Loader:
    """Reads the stage's mixture. The only state is the step.

    One step draws its whole global batch from one stream, so it has one task and one shape, for any number of ranks
    and accumulation steps. A run that resumes in another layout reads the same samples in the same steps. A rank sorts
    its samples of a step by length before it divides them into micro-batches, but for contrastive stages, whose
    partners stand beside each other.
    The steps follow the weights of the mixture evenly (`mixture.schedule`), and each stream gives every sample once
    before it gives one again (`mixture.Order`). A task with streams of several shapes divides its weight by their
    numbers of samples. Whether the data set is here or behind a cache changes nothing.

    Args:
        run: the stage's config.
        encoder: writes the prompts.
        token_px: side of a VLM token in pixels, which sets the number of placeholders of the input images.
        rank, world: this rank and the number of ranks that share the global batch.

    `waited` is how many seconds the last call of `micro_batches` took.

    Raises:
        ShardError: if the data set is incomplete, damaged or without a task of the mixture.
        ValueError: if the global batch is not a multiple of `world`.
    """

    def __init__(self, run: StageRun, encoder: PromptEncoder, token_px: int, rank: int = 0, world: int = 1):
        stage = run.stage
        self._micro, self._accumulation = run.memory.micro_batch_at(stage.resolution, stage.global_batch, world)
        self._streams = open_streams(run.data, stage.mixture, stage.resolution)
        self._seed = f"{run.seed}/{stage.name}"
        self._stream_of, self._times_taken = schedule(shares(self._streams, stage.mixture), stage.steps, self._seed)
        self._orders = [Order(s.sizes, f"{self._seed}/{s.settings.name}") for s in self._streams]
        self._encoder, self._token_px = encoder, token_px
        self._asks = run.recipe.asks_for_captions
        self._rank, self._world = rank, world
        self._paired = stage.objective.pairs
        self._threads = ThreadPoolExecutor(run.data.workers, "loader") if run.data.workers else None
        self._ahead: dict[int, Future[list[Batch]]] = {}
        self._workers, self._steps = run.data.workers, stage.steps
        self.waited = 0.0

    @property
    def settings(self) -> list[StreamSettings]:
        """What the batches of each stream of the mixture have in common."""
        return [stream.settings for stream in self._streams]

    @property
    def records(self) -> dict[str, int]:
        """Number of records that training reads of each stream."""
        return {stream.settings.name: len(stream) for stream in self._streams}

    @property
    def skipped(self) -> Counter[tuple[str, int]]:
        """(shard file, record in it) -> how often another was read in the place of this one, which is damaged."""
        return sum((stream.skipped for stream in self._streams), Counter())

    def micro_batches(self, step: int) -> list[Batch]:
        """Return this rank's micro-batches of optimizer step `step` (0-based), one for each accumulation step.

        A pure function of `step`: calls in order are merely faster, since `data.workers` threads read that many steps
        ahead. What goes wrong in a thread is raised by the call for its step.

        Raises:
            ValueError: if the stage has no such step.
        """
        if not 0 <= step < self._steps:
            raise ValueError(f"there is no step {step}; the stage has steps 0 to {self._steps - 1}")
        started = time.monotonic()
        try:
            return self._read(step) if self._threads is None else self._take(step, self._threads)
        finally:
            self.waited = time.monotonic() - started

    def close(self) -> None:
        """End the threads that read ahead."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def _take(self, step: int, threads: ThreadPoolExecutor) -> list[Batch]:
        """Step `step`, read ahead or now, and the next ones begun."""
        ahead = range(step, min(step + 1 + self._workers, self._steps))
        self._ahead = {s: self._ahead.get(s) or threads.submit(self._read, s) for s in ahead}
        return self._ahead[step].result()

    def _read(self, step: int) -> list[Batch]:
        number = self._stream_of[step]
        # Of the stream's endless sequence a step takes a global batch, a micro-step a part of that, a rank a slice.
        micro_step = self._micro * self._world
        begin = int(self._times_taken[step]) * self._accumulation * micro_step
        first = np.arange(self._accumulation) * micro_step + self._rank * self._micro
        # The partner of a sample is the next one of the global batch, so that it is the same in every layout; of a
        # micro-batch's last it is outside, unless the micro-batch is all there is.
        outside = 1 if self._paired and micro_step * self._accumulation > self._micro else 0
        places = (first[:, None] + np.arange(self._micro + outside)) % (micro_step * self._accumulation)
        indices = self._orders[number]((begin + places).flatten()).tolist()
        stream, each = self._streams[number], self._micro + outside
        if not self._paired and self._accumulation > 1:
            # In another order the samples of a step have the same gradient, and texts of one length need no padding.
            indices.sort(key=stream.text_bytes)
        return [self._batch(stream, indices[i : i + each]) for i in range(0, len(indices), each)]

    def _batch(self, stream: ShardStream, indices: Sequence[int]) -> Batch:
        """indices: of a micro-batch, and behind it the partner of its last sample, if that is outside."""
        samples = [stream[index] for index in indices]
        batch = self._collate(stream, indices, samples[: self._micro])
        if not self._paired:
            return batch
        assert batch.target is not None, "a contrastive stage draws images"
        return replace(batch, negatives=self._negatives(self._micro, samples[self._micro :], batch.target))

    def _collate(self, stream: ShardStream, indices: Sequence[int], samples: Sequence[DecodedRecord]) -> Batch:
        """Raise ShardError naming the record at fault, where a batch cannot be made of one that is as written."""
        try:
            return collate(stream.settings, samples, self._encoder, self._token_px, self._asks)
        except ValueError as error:
            for index, sample in zip(indices, samples, strict=False):
                try:
                    collate(stream.settings, [sample], self._encoder, self._token_px, self._asks)
                except ValueError as own:
                    raise ShardError(
                        f"the record {sample.id} in {stream.where(index)} cannot become part of a batch: {own}. "
                        "It is what was written, so data.damaged does not apply: fix or remove it in its source and "
                        "write the data set into another directory"
                    ) from error
            raise

    def _negatives(self, own: int, further: list[DecodedRecord], target: torch.Tensor) -> Negatives:
        latents = None
        if further and further[0].latents is not None:
            latents = torch.stack([s.stored[0] for s in further])
        return Negatives(
            index=(torch.arange(own) + 1) % (own + len(further)),
            sample_ids=torch.tensor([sample_id(s.id) for s in further], dtype=torch.int64),
            target=stacked([s.target for s in further]) if further else target[:0],
            latents=latents,
        )
