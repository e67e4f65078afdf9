"""How models are asked: held-out requests in, a picture and, where words are wanted, an answer out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from wemmu.config.schema import Sampling, StageRun
from wemmu.evaluation.requests import Ask, batch
from wemmu.pixels import to_images
from wemmu.sampling.answers import Answerer, Question
from wemmu.sampling.sampler import Request


@dataclass(frozen=True)
class Response:
    """What came back: the picture drawn, or the input restored, and what was said."""

    picture: Image.Image
    words: str = ""


# Answers requests of one task, in their order.
Respond = Callable[[Sequence[Ask]], list[Response]]


def drawing(draw: Callable[[Request, Sampling], Tensor], run: StageRun) -> Respond:
    """By a `Sampler`, or anything that draws like one."""

    def respond(asks: Sequence[Ask]) -> list[Response]:
        pictures = to_images(draw(batch(asks, run.stage.resolution), run.sampling))
        return [Response(picture) for picture in pictures]

    return respond


def answering(answerer: Answerer, run: StageRun) -> Respond:
    """By a VLM with a head that restores the picture."""

    def respond(asks: Sequence[Ask]) -> list[Response]:
        asked = batch(asks, run.stage.resolution)
        question = Question(asked.texts, asked.images, asked.sample_ids)
        restored = to_images(answerer.restored(question, run.sampling.steps, run.sampling.seed)[:, 0])
        return [Response(*pair) for pair in zip(restored, answerer.answers(question), strict=True)]

    return respond
