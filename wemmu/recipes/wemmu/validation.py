"""The validation loss: plain flow matching on held-out records, always with the same noise and times."""

from collections import Counter, defaultdict

import torch

from wemmu.config import StageRun
from wemmu.data.validation import HeldOut
from wemmu.heartbeat import beat
from wemmu.objectives.flow import square_error
from wemmu.parallel.topology import Topology, gathered
from wemmu.prompts import PromptEncoder
from wemmu.recipes.wemmu.loss import FlowMatchingLoss
from wemmu.recipes.wemmu.model import WeMMU
from wemmu.sampling.mode import in_eval_mode

# Training has no such step, so it never uses this noise.
STEP = -1


class OnHeldOut:
    """What is measured on the held-out records of a stage. All ranks create one and call it between two steps.

    Raises:
        ShardError: if a task of the stage's mixture has no record that is held out.
    """

    def __init__(
        self, run: StageRun, model: WeMMU, encoder: PromptEncoder, topology: Topology, device: torch.device | str
    ):
        # Of flow matching, whatever the stage minimises: a contrastive loss depends on who is paired with whom.
        self.model, self._loss = model, FlowMatchingLoss(model, run.changed({"stage.objective.kind": "flow"}))
        # Ranks that share a DiT are asked the same.
        shares = topology.world // (topology.tp * topology.pp)
        self._held_out = HeldOut(run, encoder, model.vlm.token_px, topology.data, shares)
        self._device = device


class Validation(OnHeldOut):
    """The loss of a stage's model at its resolution."""

    @in_eval_mode
    def __call__(self) -> float:
        """Return the mean over the tasks and shapes of the mixture, with its weights; the same number on all ranks."""
        sums, counts = defaultdict[int, float](float), Counter[int]()
        for stream, batch, counted in self._held_out.batches():
            batch = batch.to(self._device)
            flow, condition, _ = self._loss.begin(batch, STEP)
            predicted = self.model.velocity(flow.x_t, flow.t, condition)
            values = square_error(predicted, flow.v).cpu()[counted]
            sums[stream] += float(values.double().sum())
            counts[stream] += len(values)
            beat()
        by_rank = gathered((sums, counts))
        weights = self._held_out.weights
        means = [sum(s[i] for s, _ in by_rank) / sum(c[i] for _, c in by_rank) for i in range(len(weights))]
        # One rank's arithmetic, so that all come to the same decision.
        return gathered(sum(w * m for w, m in zip(weights, means, strict=True)))[0]
