"""The training loop of one stage. It knows an objective, an engine and a loader; nothing of tasks or tokens."""

import math
import time
from pathlib import Path

import torch

from wemmu.config.schema import StageRun
from wemmu.sampling.grid import sample_grid
from wemmu.training import checkpoint
from wemmu.training.build import Parts, build
from wemmu.training.signals import EXIT_INTERRUPTED, StopFlag
from wemmu.training.telemetry import Record, WandB, Window, progress_line


class TrainingError(RuntimeError):
    """Training cannot go on, and running it again would not help."""


class Trainer:
    def __init__(self, run: StageRun, folder: Path):
        """Build the parts and go to where the run folder's newest checkpoint left off."""
        self.run, self.stage, self.folder = run, run.stage, folder
        if run.threads is not None:
            torch.set_num_threads(run.threads)
        self.parts: Parts = build(run)
        self.checkpoints = folder / "checkpoints"
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.saved: int | None = None
        self.step = self._resume()
        self.record = Record(folder / "metrics.jsonl", self.step)
        self.stop = StopFlag()

    def train(self) -> int:
        """Run to the end of the stage or to a signal; returns the exit code of the process."""
        self._announce()
        wandb = WandB(self.run, self.folder)
        window, logging = Window(), self.run.logging
        while self.step < self.stage.steps and self.stop.reason is None:
            micro_batches = self.parts.loader.micro_batches(self.step)
            window.waited += self.parts.loader.waited
            norm = self._optimize(micro_batches, window)
            self.step += 1
            final = self.step == self.stage.steps
            if self.step % logging.every == 0 or final:
                wandb.log(self._log(window, norm))
                window = Window()
            if self.step % logging.samples_every == 0 or final:
                self._draw(wandb)
            if self.step % logging.checkpoint_every == 0 or final:
                self._save()
        self.parts.loader.close()
        if self.step < self.stage.steps:
            self._save()
            print(f"{self.stage.name}: stopped by {self.stop.reason} at step {self.step}, all of it saved", flush=True)
        wandb.finish()
        return EXIT_INTERRUPTED if self.step < self.stage.steps else 0

    def _optimize(self, micro_batches: list, window: Window) -> float:
        """One optimizer step over its micro-batches; returns the gradient norm before clipping."""
        for batch in micro_batches:
            losses = self.parts.loss(batch, self.step)
            self.parts.engine.backward(losses.values.sum() / self.stage.global_batch)
            values = losses.values.detach()
            window.add("loss", values)
            for name, mask in losses.tags.items():
                window.add(name, values[mask])
            window.samples += len(values)
        norm = self.parts.engine.step(self.stage.optimizer.lr_share(self.step, self.stage.steps))
        window.steps += 1
        if not math.isfinite(norm):
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
            "samples_per_s": window.samples / elapsed,
            "data_wait_share": window.waited / elapsed,
            "time": time.time(),
        }
        self.record.write(values)
        rate = window.steps / elapsed
        print(
            progress_line(self.stage.name, self.step, self.stage.steps, means, rate, values["samples_per_s"]),
            flush=True,
        )
        return values

    def _draw(self, wandb: WandB) -> None:
        """Draw the fixed prompts as the model now answers them."""
        if not self.run.sampling.prompts:
            return
        file = self.folder / "samples" / f"{checkpoint.directory_name(self.step)}.png"
        file.parent.mkdir(exist_ok=True)
        sample_grid(self.parts.sampler, self.run.sampling, self.stage.resolution).save(file)
        wandb.log({"step": self.step}, pictures=file)

    def _save(self) -> None:
        if self.step == self.saved:  # a whole checkpoint is never written over
            return
        checkpoint.save(
            self.checkpoints,
            self.parts.engine.state(),
            self.parts.carried,
            stage=self.stage.name,
            seed=self.run.seed,
            resolution=self.stage.resolution,
            frozen=self.parts.frozen,
        )
        self.saved = self.step
        checkpoint.prune(self.checkpoints, self.run.logging.keep_checkpoints)

    def _resume(self) -> int:
        checkpoint.clear_debris(self.checkpoints)
        newest = checkpoint.latest(self.checkpoints)
        if newest is None:
            return 0
        state, manifest = checkpoint.load_state(newest)
        self.parts.engine.load(state)
        print(f"{self.stage.name}: going on from {newest.name}", flush=True)
        self.saved = manifest.step
        return manifest.step

    def _announce(self) -> None:
        trained = sum(p.numel() for p in self.parts.engine.trained.values())
        frozen = sum(p.numel() for p in self.parts.model.parameters()) - trained
        for report in self.parts.reports:
            print(report, flush=True)
        print(
            f"{self.stage.name}: trains {', '.join(self.stage.trains)} ({trained / 1e6:.2f} M parameters), "
            f"{frozen / 1e6:.2f} M frozen, {self.stage.resolution} px, {self.stage.steps} steps of "
            f"{self.stage.global_batch}",
            flush=True,
        )
