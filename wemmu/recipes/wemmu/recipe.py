"""WeMMU for training, evaluation and tools."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from wemmu.backbones.adapters import adapter_of
from wemmu.backbones.full_precision import Sources
from wemmu.backbones.vae import FrozenVAE
from wemmu.backbones.weights import OnBlockLoaded
from wemmu.config.buckets import RequestSizes
from wemmu.config.schema import Sampling, StageRun
from wemmu.config.task import EDITS, GENERATION_TASKS
from wemmu.parallel.topology import Topology
from wemmu.pixels import to_images
from wemmu.recipes.lora import adapt
from wemmu.recipes.recipe import Recipe
from wemmu.recipes.wemmu.build import build_model, sources
from wemmu.recipes.wemmu.config import FlowMatching, WeMMU
from wemmu.recipes.wemmu.copying import CopyRate
from wemmu.recipes.wemmu.loss import FlowMatchingLoss
from wemmu.recipes.wemmu.model import WeMMU as Model
from wemmu.recipes.wemmu.validation import Validation
from wemmu.sampling.grid import sample_grid
from wemmu.sampling.guidance import guidance_weights
from wemmu.sampling.request import GenerationRequest, OnImages, Response, request_sizes
from wemmu.sampling.sampler import Sampler
from wemmu.sampling.solvers import Step, times


class WeMMURecipe(Recipe):
    """A bridge between a frozen VLM and a DiT."""

    model: Model
    vae: FrozenVAE
    loss: FlowMatchingLoss
    sizes: RequestSizes

    def _load(self, on_block_loaded: OnBlockLoaded | None) -> None:
        run = self._run
        assert isinstance(run.recipe, WeMMU)
        self._bridge = run.recipe.bridge
        self.model, self.reports = build_model(run.backbones, self._bridge, run.seed, on_block_loaded)
        adapt(self.model, run.recipe, run.seed)
        self.vae, self.token_px = self.model.vae, self.model.vlm.token_px
        self.caches = (self.vae.cache, self.model.vlm.cache)
        self.loss = FlowMatchingLoss(self.model, run)
        side, table = run.stage.resolution, self._bridge.position_table
        self.sizes = request_sizes(side, run.data.max_aspect, table, self.token_px, self.vae.latent_px)
        self.sampler = Sampler(self.model, self.encoder, self.loss.config.time.shift_at(side), device=self._device)

    def sources(self, every: bool = False) -> Sources:
        return sources(self._run.backbones, self._bridge, self._run.seed, self.model, every)

    def widened(self) -> frozenset[str]:
        return frozenset({f"dit.{adapter_of(self.model.dit).input_weight}"} if self._bridge.source_latents else ())

    def preview(self) -> tuple[Image.Image, int]:
        return sample_grid(self.sampler, self._run.sampling, self.sizes)

    def respond(
        self, request: GenerationRequest, sampling: Sampling | None = None, on_images: OnImages | None = None
    ) -> list[Response]:
        def on_step(step: Step) -> Tensor:
            if on_images:
                on_images(step.index, lambda: to_images(self.vae.decode(step.estimate)))
            return step.x

        return [Response(i) for i in to_images(self.sampler(request, sampling or self._run.sampling, on_step))]

    @staticmethod
    def sampling(run: StageRun) -> dict[str, Any]:
        """Return solver, times and the guidance weights of each task, as the config sets them."""
        sampling = run.sampling
        assert isinstance(run.stage.objective, FlowMatching)
        ts = times(sampling.steps, run.stage.objective.time.shift_at(run.stage.resolution)).tolist()
        return {
            "solver": {"name": sampling.solver, "steps": sampling.steps, "times": [round(t, 4) for t in ts]},
            "guidance": {
                str(task): {branch.name.lower(): weight for branch, weight in guidance_weights(task, sampling).items()}
                for task in GENERATION_TASKS
            },
        }

    def validation(self, topology: Topology, device: torch.device | str) -> Callable[[], float]:
        return Validation(self._run, self.model, self.encoder, topology, device)

    def copying(self, topology: Topology, device: torch.device | str) -> CopyRate | None:
        edits = {task: weight for task, weight in self._run.stage.mixture.items() if task in EDITS}
        if not edits:
            return None
        return CopyRate(self._run.changed({"stage.mixture": edits}), self.model, self.encoder, topology, device)


RECIPE = WeMMURecipe
