"""UAE for training, evaluation and tools."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from wemmu.backbones.full_precision import Sources
from wemmu.backbones.weights import OnBlockLoaded
from wemmu.command_line import UsageError
from wemmu.config.schema import Sampling, StageRun
from wemmu.config.task import Task
from wemmu.pixels import as_image, to_images
from wemmu.recipes.tuned_vlm import TunesVLM
from wemmu.recipes.uae.build import build_uae
from wemmu.recipes.uae.config import UAE as UAEConfig
from wemmu.recipes.uae.generator import Renderer
from wemmu.recipes.uae.learner import CaptionLearner
from wemmu.recipes.uae.model import UAE
from wemmu.recipes.uae.paths import learner_of
from wemmu.recipes.uae.policy import Policy
from wemmu.recipes.wemmu.build import dit_sources
from wemmu.report.sheet import Row, contact_sheet
from wemmu.sampling.grid import is_blank, load_image
from wemmu.sampling.mode import evaluating
from wemmu.sampling.request import GenerationRequest, OnImages, Response
from wemmu.types import Batch, Prepared


class UAERecipe(TunesVLM):
    """A VLM that is tuned to write captions for a generator, and the generator that reconstructs images from them.

    The generator stays whole.
    """

    model: UAE
    loss: CaptionLearner

    def _load(self, on_block_loaded: OnBlockLoaded | None) -> None:
        config = self._run.recipe
        assert isinstance(config, UAEConfig)
        self.model, self.reports = build_uae(self._run)
        self.vae, self.token_px = self.model.generator.vae, self.model.token_px
        self.policy = Policy(self.model, self.encoder, config.max_length)
        self.renderer = Renderer(self.model, self.encoder, config)
        self.loss = learner_of(self._run, self.policy, self.renderer)
        self.period = self.loss.period
        self.checkpoints = {"generator.": config.generator.weights}

    def sources(self, every: bool = False) -> Sources:
        """Return those of the VLM and of the generator's DiT."""
        bridge = self.renderer.config.generator.bridge
        generator = dit_sources(self._run.backbones, bridge, self.model.generator, every)
        return {**super().sources(every), **{f"generator.{name}": source for name, source in generator.items()}}

    def prepare(self, batches: Sequence[Batch], step: int) -> Prepared:
        return self.loss.prepare(batches, step)

    def preview(self) -> tuple[Image.Image, int]:
        """Return a sheet of the fixed prompts' images, their captions and what these are rendered as."""
        rows, side = [], self._run.stage.resolution
        for number, path in enumerate(path for prompt in self._run.sampling.prompts for path in prompt.images):
            image = load_image(path, side)
            asked = GenerationRequest(Task.CAPTION, [""], image[None, None], (side, side), torch.tensor([number]))
            (response,) = self.respond(asked)
            rows.append(Row(response.words, [as_image(image), response.image]))
        return contact_sheet(rows), sum(is_blank(row.images[-1]) for row in rows)

    def respond(
        self, request: GenerationRequest, sampling: Sampling | None = None, on_images: OnImages | None = None
    ) -> list[Response]:
        """Return the likeliest caption of each image and its rendering; of a question, the likeliest answer."""
        instruction = self.renderer.config.instruction
        if (count := request.images.shape[1]) > 1:
            raise UsageError(f"{count} images were given; the recipe uae captions one image")
        images = request.images.to(self._device)
        with evaluating(self.model):
            asked = [text or instruction for text in request.texts]
            words = self.policy.most_likely(asked, images).texts
            captions = [i for i, text in enumerate(asked) if text == instruction]
            shown = [as_image(image) for image in request.images[:, 0].cpu()]
            if captions:
                made = self.renderer([words[i] for i in captions], images[captions], request.sample_ids[captions])
                for i, image in zip(captions, to_images(made * 2 - 1), strict=True):
                    shown[i] = image
        return [Response(image, text, i in captions) for i, (image, text) in enumerate(zip(shown, words, strict=True))]

    @staticmethod
    def sampling(run: StageRun) -> dict[str, Any]:
        config = run.recipe
        assert isinstance(config, UAEConfig)
        rendering = config.generator.model_dump(mode="json", include={"steps", "shift", "guidance", "seed"})
        return {"captions": "most likely token", "condition": config.condition, "rendering": rendering}


RECIPE = UAERecipe
