"""The copy rate of held-out edits during training: from one evaluation of the DiT on pure noise."""

from collections import defaultdict

import torch

from wemmu.heartbeat import beat
from wemmu.noise import Noise
from wemmu.objectives.copying import COPIED, copy_position
from wemmu.parallel.topology import gathered
from wemmu.recipes.wemmu.validation import STEP, OnHeldOut
from wemmu.sampling.mode import in_eval_mode


class CopyRate(OnHeldOut):
    """The share of held-out edits whose output copies the input, of a stage whose mixture has edits alone.

    At t = 1 the DiT sees noise alone, so x_0 = eps - v is what the condition makes it expect: nothing of the target
    leaks in, and one evaluation shows what the first step of sampling aims at. Guidance is not applied.
    """

    @in_eval_mode
    def __call__(self) -> dict[str, float]:
        """Return `copy_rate/TASK`, the share of copied edits, and `copy_position/TASK`, their mean `copy_position`."""
        found = defaultdict[str, list[float]](list)
        for _, batch, counted in self._held_out.batches():
            batch = batch.to(self._device)
            assert batch.target is not None, "edits have one"
            stored = (None, None) if batch.latents is None else (batch.latents.target, batch.latents.images)
            target = self.model.target_latents(batch.target, stored[0]).float()  # [B, C, h, w]
            size, encode = (batch.target.shape[-2], batch.target.shape[-1]), self.model.source_latents
            numbers = range(batch.images.shape[1])
            inputs = torch.stack([encode(batch.images, size, stored[1], batch.sizes, n) for n in numbers], dim=1)
            noise = Noise(self._loss.seed, STEP, batch.sample_ids, target.device, self._loss.source)
            eps = noise.normal("eps", tuple(target.shape[1:]))
            v = self.model.velocity(eps, eps.new_ones(len(eps)), self._loss.condition(batch, STEP))
            position = copy_position(eps - v, target, inputs).cpu()[counted]
            found[str(batch.task)] += position[~position.isnan()].tolist()
            beat()
        by_rank = gathered(dict(found))
        every = {
            task: [p for rank in by_rank for p in rank.get(task, ())]
            for task in dict.fromkeys(t for r in by_rank for t in r)
        }
        return {
            f"copy_{what}/{task}": value
            for task, positions in every.items()
            if positions
            for what, value in (
                ("rate", sum(p > COPIED for p in positions) / len(positions)),
                ("position", sum(positions) / len(positions)),
            )
        }
