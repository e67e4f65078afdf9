"""ROSS for training, evaluation and tools."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from wemmu.backbones.weights import OnBlockLoaded
from wemmu.config.schema import Sampling, StageRun
from wemmu.config.task import Task
from wemmu.parallel.topology import gathered
from wemmu.pixels import as_image, to_images
from wemmu.recipes.lora import adapt
from wemmu.recipes.ross.answers import Answerer
from wemmu.recipes.ross.build import build_ross
from wemmu.recipes.ross.config import Denoiser, ReconstructiveTuning
from wemmu.recipes.ross.config import Ross as RossConfig
from wemmu.recipes.ross.loss import ReconstructiveLoss
from wemmu.recipes.ross.model import Ross
from wemmu.recipes.ross.targets import FeatureTarget
from wemmu.recipes.tuned_vlm import TunesVLM
from wemmu.report.sheet import Row, contact_sheet
from wemmu.sampling.grid import is_blank, load_image
from wemmu.sampling.request import GenerationRequest, OnImages, Response
from wemmu.types import IGNORE_INDEX, Batch, Prepared


class RossRecipe(TunesVLM):
    """A VLM that is tuned to answer and, with a head, to reconstruct the image."""

    model: Ross

    def _load(self, on_block_loaded: OnBlockLoaded | None) -> None:
        run = self._run
        assert isinstance(run.recipe, RossConfig)
        self.model, self.reports = build_ross(run.backbones, run.recipe, run.seed)
        adapt(self.model, run.recipe, run.seed)
        self.vae, self.token_px = self.model.vae, self.model.token_px
        if isinstance(self.model.targets, FeatureTarget):
            self.caches = (self.model.targets.cache,)
        elif self.vae is not None:
            self.caches = (self.vae.cache,)
        self.loss = ReconstructiveLoss(self.model, run)
        self.answerer = Answerer(self.model, self.encoder, device=self._device)

    def prepare(self, batches: Sequence[Batch], step: int) -> Prepared:
        """Count the labels of the whole step where the loss is a mean over them."""
        objective = self._run.stage.objective
        assert isinstance(objective, ReconstructiveTuning)
        if objective.answers == "sample":
            return Prepared(batches)
        mine = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches if batch.labels is not None)
        length = max(1, sum(gathered(mine))) / self._run.stage.global_batch
        return Prepared([replace(batch, answer_length=length) for batch in batches])

    def preview(self) -> tuple[Image.Image, int]:
        """Return a sheet of the fixed prompts' images, their reconstructions and answers."""
        rows, sampling, side = [], self._run.sampling, self._run.stage.resolution
        for number, prompt in enumerate(p for p in sampling.prompts if p.images):
            images = torch.stack([load_image(path, side) for path in prompt.images])
            ids = torch.tensor([number])
            request = GenerationRequest(Task.UNDERSTANDING, [prompt.text], images[None], (side, side), ids)
            (answer,) = self.answerer.answers(request)
            restored = to_images(self.answerer.restored(request, sampling.steps, sampling.seed)[0])
            words = f"{prompt.text or '(no words)'}: {answer}"
            rows += [Row(words, [as_image(image), made]) for image, made in zip(images, restored, strict=True)]
        return contact_sheet(rows), sum(is_blank(row.images[-1]) for row in rows)

    def respond(
        self, request: GenerationRequest, sampling: Sampling | None = None, on_images: OnImages | None = None
    ) -> list[Response]:
        """Return the reconstruction of each sample's first image, and the answers."""
        sampling = sampling or self._run.sampling
        restored = to_images(self.answerer.restored(request, sampling.steps, sampling.seed)[:, 0])
        return [Response(*pair, True) for pair in zip(restored, self.answerer.answers(request), strict=True)]

    @staticmethod
    def sampling(run: StageRun) -> dict[str, Any]:
        assert isinstance(run.recipe, RossConfig)
        denoises = isinstance(run.recipe.head, Denoiser)
        return {"solver": {"name": "ddim", "steps": run.sampling.steps}} if denoises else {}


RECIPE = RossRecipe
