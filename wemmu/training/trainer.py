"""The training loop of one stage: a recipe, an engine and a loader. What tasks, modules and tokens are, these know."""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import SupportsFloat

import torch

from wemmu.checkpoint import store
from wemmu.checkpoint.manifest import Manifest, Origin
from wemmu.checkpoint.saver import Saver
from wemmu.command_line import SAVED
from wemmu.config.checkpoints import CHECKPOINTS, directory_name, own_checkpoints, sheet
from wemmu.config.files import replace_text, replacing
from wemmu.config.schema import StageRun
from wemmu.config.shards import ShardError
from wemmu.config.wandb_mode import wandb_mode
from wemmu.heartbeat import beat
from wemmu.jsonlines import append_event
from wemmu.parallel.rendezvous import connect
from wemmu.parallel.topology import any_rank
from wemmu.training import environment, resume
from wemmu.training.build import StageParts, build
from wemmu.training.copying import copies, last_measured
from wemmu.training.hold import held
from wemmu.training.resolutions import ResolutionSchedule
from wemmu.training.signals import StopFlag
from wemmu.training.telemetry import Record, Window, progress_line
from wemmu.training.upload import WandbUploader
from wemmu.training.workload import Workload, peak_flops
from wemmu.types import Batch


class TrainingError(RuntimeError):
    """Training cannot continue; another attempt would fail as well."""


class Trainer:
    """One rank's part of a stage. All ranks run the same loop; the leading rank prints and writes."""

    def __init__(self, run: StageRun, folder: Path, stop: StopFlag | None = None):
        """Connect to the other ranks, build the parts and load the newest checkpoint of the run folder.

        stop: set up earlier, so that what comes in between is not missed.
        """
        self.stop = stop or StopFlag()
        self.run, self.stage, self.folder = run, run.stage, folder
        if run.threads is not None:
            torch.set_num_threads(run.threads)
        with self.stop.ends_process("the ranks were connecting"):
            self.topology, self.device = connect(run.parallel)
        with ExitStack() as stack:
            stack.enter_context(held(folder))
            self._begin()
            self._held = stack.pop_all()

    def _begin(self) -> None:
        """Build the parts and load the newest checkpoint."""
        run, folder = self.run, self.folder
        self.schedule = ResolutionSchedule(self.stage, folder, self.topology.leads)
        self.parts: StageParts = build(run, self.topology, self.device)
        self.checkpoints = folder / CHECKPOINTS
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.saved: int | None = None
        self._norms: deque[tuple[int, SupportsFloat]] = deque()
        self.changes: list[str] = []
        self.origin = self._resume()
        self.step = self.origin.first_step
        self.saver = Saver(self.checkpoints, run.logging.keep_checkpoints, self.origin)
        self.record = Record(folder / "metrics.jsonl", self.step) if self.topology.leads else None
        self.workload = Workload(run)
        self.peak = peak_flops(run, self.device)
        self.schedule.go_on(self.step)
        self.validation: Callable[[], float] | None = None
        if self.schedule.validates:
            self.validation = self.parts.recipe.validation(self.topology, self.device)
        self.copying = self._copying()

    def train(self) -> int:
        """Run to the end of the stage or its resolution, or to a signal; return the exit code of the process."""
        with self._held:
            return self._train()

    def _train(self) -> int:
        self._announce()
        uploader = self._show() if self.topology.leads else None
        window, logging = self._window(), self.run.logging
        ending, due = self.schedule.ending(self.step), False
        while ending is None and not (self._resumable and any_rank(self.stop.reason is not None)):
            micro_batches = self.parts.loader.micro_batches(self.step)
            window.waited += self.parts.loader.waited
            norm = self._optimize(micro_batches, window)
            self.step += 1
            beat()
            self._validate()
            ending = self.schedule.ending(self.step)
            final = ending is not None
            if self.step % logging.every == 0 or final:
                self._log(window, norm)
                window = self._window()
            if self.step % logging.samples_every == 0 or final:
                self._draw()
                self._watch_copies()
            due = due or self.step % logging.checkpoint_every == 0 or final
            if due and self._resumable:
                self._save()
                due = False
        self.parts.loader.close()
        if ending is None and self.step > 0:
            self._save()
        self.saver.close()
        if ending is not None:
            self.schedule.close(self.step, ending)
            self._say(f"ends at step {self.step}: {ending.reason}")
        else:
            saved = f"at step {self.step}, all of it saved" if self.step else "before the first step: nothing to save"
            self._say(f"stopped by {self.stop.reason or 'another rank'} {saved}")
        if uploader is not None and (lacking := uploader.finish()):
            self._say(lacking)
        return SAVED if ending is None else 0

    @property
    def _resumable(self) -> bool:
        """Whether nothing that the next step needs is in memory only."""
        return self.step % self.parts.recipe.period == 0

    def _optimize(self, micro_batches: list[Batch], window: Window) -> SupportsFloat:
        """One optimizer step over its micro-batches; returns the gradient norm before clipping, to be read later."""
        window.counts.update(self.workload.count(micro_batches))
        batches = [batch.to(self.device) for batch in micro_batches]
        prepared, started = self.parts.recipe.prepare(batches, self.step), time.monotonic()
        for losses in self.parts.engine.accumulate(prepared.batches, self.step):
            window.add(losses)
        norm = self.parts.engine.step(self.stage.optimizer.lr_share(self.step, self.stage.steps))
        window.note(prepared, time.monotonic() - started)
        window.steps += 1
        self._norms.append((self.step, norm))
        # On a GPU the newest is still being computed; the one before has arrived.
        self._check_norms(but=0 if isinstance(norm, float) else 1)
        return norm

    def _check_norms(self, but: int = 0) -> None:
        """End the run if a gradient was not finite; leave the newest `but` norms unread."""
        while len(self._norms) > but:
            step, norm = self._norms.popleft()
            if not math.isfinite(norm):
                self.saver.close()
                saved = own_checkpoints(self.checkpoints)
                raise TrainingError(
                    f"{self.stage.name}: the gradient is not finite at step {step}; the weights are unchanged. "
                    f"The last checkpoint is {next(reversed(saved), None)}; a lower learning rate may help."
                )

    def _window(self) -> Window:
        return Window(self.stage.mixture, self.device)

    def _log(self, window: Window, norm: SupportsFloat) -> None:
        rate = window.steps / (time.monotonic() - window.started)
        seen = window.close()
        if self.record is None:
            return
        optimizer = self.stage.optimizer
        share = optimizer.lr_share(self.step - 1, self.stage.steps)
        values = {
            "step": self.step,
            "samples": self.origin.first_samples + (self.step - self.origin.first_step) * self.stage.global_batch,
            **seen,
            "grad_norm": float(norm),
            "lr": optimizer.lr * share,
            "time": time.time(),
        }
        own = ((module, optimizer.module_lr.get(module)) for module in self.stage.trains)
        values |= {f"{module}_lr": lr * share for module, lr in own if lr is not None}
        if self.peak is not None and "flops_per_s" in values:
            values["mfu"] = values["flops_per_s"] / (self.peak * self.topology.world)
        self.record.write(values)
        self.stop.tell(progress_line(self.stage.name, self.step, self.stage.steps, values, rate))

    def _validate(self) -> None:
        """Compute the validation loss if the end of the resolution depends on it. All ranks call it."""
        if self.validation is None or not self.schedule.due(self.step):
            return
        loss = self.validation()
        if self.record is not None:
            self.record.write({"step": self.step, "validation_loss": loss})
        self.schedule.note(loss)
        self._say(f"validation loss {loss:.5f} at step {self.step}")

    def _copying(self) -> Callable[[], Mapping[str, float]] | None:
        """Return what measures the copy rate of edits, if records are held out."""
        if not self.run.data.validation:
            return None
        try:
            return self.parts.recipe.copying(self.topology, self.device)
        except ShardError as error:
            self._say(f"the copy rate of edits is not measured: {error}")
            return None

    def _watch_copies(self) -> None:
        """Measure the copy rate, and warn when the model begins to copy. All ranks call it."""
        if self.copying is None:
            return
        found = self.copying()
        if self.record is not None and found:
            before = last_measured(self.folder / "metrics.jsonl")
            self.record.write({"step": self.step, **found})
            rates = (f"{key.partition('/')[2]} {value:.0%}" for key, value in found.items() if "copy_rate/" in key)
            self._say(f"held-out edits copied at step {self.step}: {', '.join(rates)}")
            for sentence in copies(before, found):
                self._say(f"warning: {sentence}")

    def _draw(self) -> None:
        """Draw the fixed prompts as the model now answers them. All ranks do, since each holds a part of the model."""
        if not self.run.sampling.prompts:
            return
        grid, blank = self.parts.recipe.preview()
        beat()
        if self.record is not None:
            file = sheet(self.folder, self.step)
            file.parent.mkdir(exist_ok=True)
            with replacing(file) as aside:
                grid.save(aside, "PNG")
            self.record.write({"step": self.step, "images": len(self.run.sampling.prompts), "blank_images": blank})

    def _show(self) -> WandbUploader:
        """Start the upload to W&B."""
        environment.record(self.folder, self.step, self.device)
        if self.changes:
            append_event(self.folder, {"event": "changed", "from_step": self.step, "reason": "; ".join(self.changes)})
        mode = wandb_mode(self.run.logging)
        self._say(f"W&B {mode.name}: {mode.reason}")
        return WandbUploader(mode, self.folder)

    def _save(self) -> None:
        self._check_norms()
        if self.step == self.saved:  # a whole checkpoint is never written over
            return
        self.saver.save(self.parts.engine.state(), self.parts.carried)
        self.saved = self.step
        beat()

    def _resume(self) -> Origin:
        """Fill the state from the newest checkpoint; return the step at which this attempt begins."""
        origin = Origin(
            self.stage.name, self.run.seed, self.stage.resolution, self.parts.frozen, self.run.parallel.model_dump(),
            resume.settings(self.run, self.parts.loader.records, self.parts.kernels, self.device),
            adapters=self.parts.adapters, copied=self.parts.copied,
        )  # fmt: skip

        def check(directory: Path, manifest: Manifest) -> None:
            self.changes = resume.check(directory, manifest, origin, self.run)

        manifest = store.load_newest(self.checkpoints, self.parts.engine.state(), check)
        if manifest is None:
            return origin
        self.parts.engine.on_restore(manifest.step)
        self._say(f"going on from {directory_name(manifest.step)}")
        for change in self.changes:
            self._say(f"changed since that checkpoint: {change}")
        if manifest.ema != (self.stage.optimizer.ema_decay is not None):
            self._say(
                "its moving average of the weights (EMA) ends here: optimizer.ema_decay is not set"
                if manifest.ema
                else "it holds no moving average of the weights (EMA), so the average begins with the weights it holds"
            )
        self.saved = manifest.step
        seen = resume.samples_seen(manifest)
        first_samples = manifest.step * self.stage.global_batch if seen is None else seen
        return replace(origin, first_step=manifest.step, first_samples=first_samples)

    def _announce(self) -> None:
        trained, frozen = self.parts.parameters
        if self.topology.leads:
            self.stop.tell("\n".join(map(str, self.parts.recipe.reports.values())))
        if self.workload.unknown:
            self._say(f"tokens and FLOPs are not counted: {self.workload.unknown}")
        layout = self.run.parallel
        self._say(
            f"trains {', '.join(map(self._described, self.stage.trains))} ({trained / 1e6:.2f} M of "
            f"{(trained + frozen) / 1e6:.2f} M parameters), "
            f"{self.stage.resolution} px, {self.stage.steps} steps of {self.stage.global_batch}, engine {layout.engine}"
            + (f" on {layout.ranks} ranks, tp {layout.tp}, pp {layout.pp}" if layout.ranks > 1 else "")
        )
        if packed := self.run.memory.quantize:
            self._say(f"frozen weights in 8 or 4 bit: {', '.join(f'{part} {kind}' for part, kind in packed.items())}")
        self._say(f"kernels on {self.device}: {self.parts.kernels}")
        if self.topology.leads:
            replace_text(self.folder / "kernels.json", json.dumps(asdict(self.parts.kernels), indent=1) + "\n")

    def _described(self, module: str) -> str:
        """Name a module, and how it learns if not by its own weights."""
        adapted = self.parts.recipe.model.adapters.get(module)
        if adapted is None:
            return module
        return f"{module} by LoRA of rank {self.run.recipe.lora[module].rank} in {len(adapted.layers)} layers"

    def _say(self, what: str) -> None:
        if self.topology.leads:
            self.stop.tell(f"{self.stage.label}: {what}")
