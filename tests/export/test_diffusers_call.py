"""A pipeline takes what users of diffusers pass, and does with it what they expect."""

import numpy as np
import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor

from tests.export.conftest import Trained
from tests.export.fresh import noise_image
from tests.models.world import random_images
from wemmu.backbones.vae import FrozenVAE
from wemmu.config.task import Task
from wemmu.pipeline import WeMMUPipeline
from wemmu.pixels import fitted, on_canvas
from wemmu.prompts import PromptEncoder
from wemmu.sampling.request import GenerationRequest, task_of
from wemmu.sampling.sampler import Sampler

SMALL = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}


def test_several_images_of_a_prompt_stand_beside_each_other(pipe: WeMMUPipeline):
    texts, inputs = ["a red circle", "make it red"], [None, noise_image(0)]
    made = pipe(texts, image=inputs, num_images_per_prompt=2, seed=5, **SMALL).images
    repeated = [x for x in texts for _ in range(2)], [x for x in inputs for _ in range(2)]
    assert torch.equal(made, pipe(repeated[0], image=repeated[1], seed=5, **SMALL).images)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    alone = pipe(texts[0], generator=torch.Generator().manual_seed(1), **SMALL).images
    pair = pipe(texts[0], num_images_per_prompt=2, generator=generators, **SMALL).images
    torch.testing.assert_close(pair[1:], alone, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="2 prompts need 2 seeds or generators, got 1"):
        pipe(texts[0], num_images_per_prompt=2, generator=generators[:1], **SMALL)
    with pytest.raises(ValueError, match="num_images_per_prompt is 0"):
        pipe(texts[0], num_images_per_prompt=0, **SMALL)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_callback_sees_every_step_and_may_replace_the_latents(pipe: WeMMUPipeline, solver: str):
    seen: list[tuple[int, float, Tensor, Tensor]] = []

    def watch(given: WeMMUPipeline, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict:
        assert given is pipe
        seen.append((index, float(timestep), tensors["latents"], tensors["estimate"]))
        return {"latents": torch.zeros_like(tensors["latents"])} if index == 2 else {}

    call = SMALL | {"num_inference_steps": 3, "seed": 1, "solver": solver, "output_type": "latent"}
    both = {"callback_on_step_end": watch, "callback_on_step_end_tensor_inputs": ["latents", "estimate"]}
    replaced = pipe("a red circle", **call, **both).images
    plain = pipe("a red circle", **call).images
    assert [index for index, *_ in seen] == [0, 1, 2]
    assert [t for _, t, *_ in seen] == sorted((t for _, t, *_ in seen), reverse=True)
    assert seen[0][1] == 1000
    # The last step ends at the data, where latents and estimate are one; it was replaced only afterwards.
    torch.testing.assert_close(seen[2][2], seen[2][3])
    torch.testing.assert_close(seen[2][2], plain)
    assert not replaced.any()
    with pytest.raises(ValueError, match="prompt_embeds; valid choices: latents, estimate"):
        pipe("a", callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["prompt_embeds"], **SMALL)


def test_latents_are_those_of_the_image_and_a_tuple_comes_back_if_wanted(pipe: WeMMUPipeline):
    image = pipe("a red circle", seed=1, **SMALL).images
    (latents,) = pipe("a red circle", seed=1, return_dict=False, **SMALL | {"output_type": "latent"})
    assert latents.shape == (1, pipe.transformer.config.in_channels, 2, 2)
    decoded = (FrozenVAE(pipe.vae).decode(latents) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decoded, image)


def test_one_guidance_scale_is_that_of_the_text_and_a_negative_prompt_changes_its_origin(pipe: WeMMUPipeline):
    call = SMALL | {"seed": 1}
    for text, image, name in (("a red circle", None, "t2i"), ("make it red", noise_image(0), "instruction")):
        one = pipe(text, image=image, guidance_scale=7.0, **call).images
        assert torch.equal(one, pipe(text, image=image, **{f"{name}_guidance_scale": 7.0}, **call).images)
        plain, other = (pipe(text, image=image, negative_prompt=n, **call).images for n in ("", "a blue square"))
        assert torch.equal(plain, pipe(text, image=image, **call).images)
        assert not torch.allclose(plain, other, atol=1e-4)
    # At scale 1 nothing is led away from, as everywhere in diffusers.
    calls = [
        pipe("a red circle", guidance_scale=1.0, negative_prompt=n, **call).images for n in (None, "a blue square")
    ]
    assert torch.equal(*calls)
    with pytest.raises(ValueError, match=r"negative_prompt is .* a list of 1, one for each prompt"):
        pipe("a", negative_prompt=["b", "c"], **SMALL)
    for wrong in (3, ["\ud800"], {"b"}):
        with pytest.raises(ValueError, match=r"negative_prompt is|surrogate"):
            pipe("a", negative_prompt=wrong, **SMALL)


def test_heun_follows_the_times_of_training(trained: Trained, pipe: WeMMUPipeline):
    stage, request = (
        trained.run.stage,
        GenerationRequest(
            task_of("a red circle", 0),
            ["a red circle"],
            torch.zeros(1, 0, 3, 32, 32, dtype=torch.uint8),
            (32, 32),
            torch.tensor([1]),
        ),
    )
    shift = stage.objective.time.shift_at(stage.resolution)
    sampler = Sampler(trained.model, PromptEncoder(trained.run.backbones.vlm), shift)
    sampling = trained.run.sampling.model_copy(update={"solver": "heun", "steps": 2})
    expected = (sampler(request, sampling) / 2 + 0.5).clamp(0, 1)
    drawn = pipe("a red circle", seed=1, solver="heun", **SMALL).images
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(drawn, pipe("a red circle", seed=1, **SMALL).images, atol=1e-3)
    with pytest.raises(ValueError, match="solver is 'ddim'; valid choices: euler, heun"):
        pipe("a", solver="ddim", **SMALL)


def test_sizes_that_do_not_fit_are_named(pipe: WeMMUPipeline):
    with pytest.raises(ValueError, match="height and width must be multiples of 16 px, got"):
        pipe("a", height=40, width=32)
    assert np.shape(pipe("a", height=32, width=48, num_inference_steps=1, output_type="np").images) == (1, 32, 48, 3)


@pytest.fixture
def oblong(pipe: WeMMUPipeline) -> WeMMUPipeline:
    """The pipeline as if its training had had images of all shapes."""
    return WeMMUPipeline(**pipe.components | {"max_aspect": 2.0})


def test_an_edit_has_the_shape_of_its_first_input_and_every_input_keeps_its_own(trained: Trained, oblong):
    wide, tall = (Image.fromarray(random_images(n, *size, 3).numpy()) for n, size in enumerate([(60, 100), (80, 50)]))
    call = {"num_inference_steps": 2, "seed": 1}
    (both,), (swapped,) = (oblong("mix them", image=list(i), **call).images for i in ((wide, tall), (tall, wide)))
    assert (both.size, swapped.size) == ((80, 48), (48, 80))
    assert oblong("mix them", image=[wide, tall], height=64, width=64, **call).images[0].size == (64, 64)
    # Neither is cropped to the shape of the other: this is what the model sees.
    images, sizes = on_canvas([[fitted(wide, (48, 80)), fitted(tall, (80, 48))]], (48, 80))
    stage = trained.run.stage
    sampler = Sampler(
        trained.model, PromptEncoder(trained.run.backbones.vlm), stage.objective.time.shift_at(stage.resolution)
    )
    sampling = trained.run.sampling.model_copy(update={"steps": 2})
    request = GenerationRequest(Task.MULTI_EDIT, ["mix them"], images, (48, 80), torch.tensor([1]), sizes=sizes)
    expected = (sampler(request, sampling) / 2 + 0.5).clamp(0, 1)
    drawn = oblong("mix them", image=[wide, tall], output_type="pt", **call).images
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=0)
    assert oblong("a red circle", **call).images[0].size == (64, 64)


def test_one_call_edits_images_of_many_shapes(oblong: WeMMUPipeline):
    shapes = [(60, 100), (64, 64), (100, 60)]
    inputs = [Image.fromarray(random_images(n, *size, 3).numpy()) for n, size in enumerate(shapes)]
    call = {"num_inference_steps": 2, "output_type": "pt"}
    drawn = oblong(["make it red"] * 3, image=inputs, seed=[1, 2, 3], num_inference_steps=2).images
    assert [image.size for image in drawn] == [(80, 48), (64, 64), (48, 80)]
    # One size of the output, inputs of several in one batch.
    square = oblong(["make it red"] * 3, image=inputs, seed=[1, 2, 3], height=64, width=64, **call).images
    for number, image in enumerate(inputs):
        (alone,) = oblong("make it red", image=image, seed=number + 1, height=64, width=64, **call).images
        torch.testing.assert_close(square[number], alone, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"different sizes.* give height and width"):
        oblong(["make it red"] * 3, image=inputs, seed=1, **call)


def test_what_is_cropped_is_said_and_a_model_of_squares_crops_to_squares(pipe: WeMMUPipeline, oblong, caplog):
    wide, call = Image.new("RGB", (100, 60)), {"num_inference_steps": 1, "seed": 1}
    diffusers_logging.enable_propagation()
    with caplog.at_level("WARNING"):
        assert pipe("make it red", image=wide, **call).images[0].size == (64, 64)
        (line,) = [record.getMessage() for record in caplog.records if "input image" in record.getMessage()]
        assert "input image 1 of 60 x 100 px" in line
        assert "becomes 64 x 64 px and loses 40% at its edges" in line
        caplog.clear()
        oblong("make it red", image=wide, **call)
        assert not [record for record in caplog.records if "input image" in record.getMessage()]
