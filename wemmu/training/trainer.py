"""The training loop of one stage. It knows an objective, an engine and a loader; nothing of tasks or tokens."""

import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch

from wemmu.config.files import replace_text
from wemmu.config.schema import StageRun
from wemmu.parallel.topology import any_rank, connect
from wemmu.sampling.grid import sample_grid
from wemmu.training import checkpoint
from wemmu.training.build import Parts, build
from wemmu.training.manifest import Origin
from wemmu.training.saver import Saver
from wemmu.training.signals import EXIT_INTERRUPTED, StopFlag
from wemmu.training.telemetry import Record, WandB, Window, progress_line
from wemmu.types import Batch


class TrainingError(RuntimeError):
    """Training cannot go on, and running it again would not help."""


class Trainer:
    """One rank's part of a stage. All ranks run the same loop; the leading one speaks and writes."""

    def __init__(self, run: StageRun, folder: Path):
        """Join the other ranks, build the parts and go to where the run folder's newest checkpoint left off."""
        self.run, self.stage, self.folder = run, run.stage, folder
        if run.threads is not None:
            torch.set_num_threads(run.threads)
        self.topology, self.device = connect(run.parallel)
        self.parts: Parts = build(run, self.topology, self.device)
        self.checkpoints = folder / "checkpoints"
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        origin = Origin(
            self.stage.name, run.seed, self.stage.resolution, self.parts.frozen, layout=run.parallel.model_dump()
        )
        self.saver = Saver(self.checkpoints, run.logging.keep_checkpoints, origin)
        self.saved: int | None = None
        self.step = self._resume()
        self.record = Record(folder / "metrics.jsonl", self.step) if self.topology.leads else None
        self.stop = StopFlag()

    def train(self) -> int:
        """Run to the end of the stage or to a signal; returns the exit code of the process."""
        self._announce()
        wandb = WandB(self.run, self.folder) if self.topology.leads else None
        window, logging = Window(), self.run.logging
        while self.step < self.stage.steps and not any_rank(self.stop.reason is not None):
            micro_batches = self.parts.loader.micro_batches(self.step)
            window.waited += self.parts.loader.waited
            norm = self._optimize(micro_batches, window)
            self.step += 1
            final = self.step == self.stage.steps
            if self.step % logging.every == 0 or final:
                values = self._log(window, norm)
                if wandb is not None:
                    wandb.log(values)
                window = Window()
            if self.step % logging.samples_every == 0 or final:
                self._draw(wandb)
            if self.step % logging.checkpoint_every == 0 or final:
                self._save()
        self.parts.loader.close()
        if self.step < self.stage.steps:
            self._save()
        self.saver.close()
        if self.step < self.stage.steps:
            self._say(f"stopped by {self.stop.reason or 'another rank'} at step {self.step}, all of it saved")
        if wandb is not None:
            wandb.finish()
        return EXIT_INTERRUPTED if self.step < self.stage.steps else 0

    def _optimize(self, micro_batches: list[Batch], window: Window) -> float:
        """One optimizer step over its micro-batches; returns the gradient norm before clipping."""
        batches = [batch.to(self.device) for batch in micro_batches]
        for losses in self.parts.engine.accumulate(batches, self.step):
            window.add("loss", losses.values)
            for name, mask in losses.tags.items():
                window.add(name, losses.values[mask])
        norm = self.parts.engine.step(self.stage.optimizer.lr_share(self.step, self.stage.steps))
        window.steps += 1
        if not math.isfinite(norm):
            self.saver.close()
            raise TrainingError(
                f"{self.stage.name}: the gradient is not finite at step {self.step}; the weights were left alone. "
                f"The last checkpoint is {checkpoint.latest(self.checkpoints)}; a lower learning rate may help."
            )
        return norm

    def _log(self, window: Window, norm: float) -> dict[str, float]:
        elapsed = time.monotonic() - window.started
        means = window.means()
        share = self.stage.optimizer.lr_share(self.step - 1, self.stage.steps)
        values = {
            "step": self.step,
            "samples": self.step * self.stage.global_batch,
            **means,
            "grad_norm": norm,
            "lr": self.stage.optimizer.lr * share,
            "samples_per_s": window.steps * self.stage.global_batch / elapsed,
            "data_wait_share": window.waited / elapsed,
            "time": time.time(),
        }
        if self.record is not None:
            self.record.write(values)
            rate = window.steps / elapsed
            line = progress_line(self.stage.name, self.step, self.stage.steps, means, rate, values["samples_per_s"])
            print(line, flush=True)
        return values

    def _draw(self, wandb: WandB | None) -> None:
        """Draw the fixed prompts as the model now answers them. All ranks do, since each holds a part of the model."""
        if not self.run.sampling.prompts:
            return
        grid = sample_grid(self.parts.sampler, self.run.sampling, self.stage.resolution)
        if wandb is not None:
            file = self.folder / "samples" / f"{checkpoint.directory_name(self.step)}.png"
            file.parent.mkdir(exist_ok=True)
            grid.save(file)
            wandb.log({"step": self.step}, pictures=file)

    def _save(self) -> None:
        if self.step == self.saved:  # a whole checkpoint is never written over
            return
        self.saver.save(self.parts.engine.state(), self.parts.carried)
        self.saved = self.step

    def _resume(self) -> int:
        manifest = checkpoint.load_newest(self.checkpoints, self.parts.engine.state())
        if manifest is None:
            return 0
        self.parts.engine.restored(manifest.step)
        self._say(f"going on from {checkpoint.directory_name(manifest.step)}")
        self.saved = manifest.step
        return manifest.step

    def _announce(self) -> None:
        trained, frozen = self.parts.engine.parameters
        if self.topology.leads:
            print(*self.parts.reports, sep="\n", flush=True)
        layout = self.run.parallel
        self._say(
            f"trains {', '.join(self.stage.trains)} ({trained / 1e6:.2f} M parameters), {frozen / 1e6:.2f} M frozen, "
            f"{self.stage.resolution} px, {self.stage.steps} steps of {self.stage.global_batch}, engine {layout.engine}"
            + (f" on {layout.ranks} ranks, tp {layout.tp}, pp {layout.pp}" if layout.ranks > 1 else "")
        )
        self._say(f"kernels on {self.device}: {self.parts.kernels}")
        if self.topology.leads:
            replace_text(self.folder / "kernels.json", json.dumps(asdict(self.parts.kernels), indent=1) + "\n")

    def _say(self, what: str) -> None:
        if self.topology.leads:
            print(f"{self.stage.name}: {what}", flush=True)
