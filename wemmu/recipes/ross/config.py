"""The config of ROSS (arXiv 2410.09575): a VLM with a head that reconstructs images from the language model's states.

Where the released code and the paper differ or are silent, the default is argued beside the field.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from wemmu.config.base import Config, LocalPath, Positive
from wemmu.config.objectives import Metric, Objective
from wemmu.config.recipe import RecipeConfig
from wemmu.config.task import UNDERSTANDING_TASKS, Task

# A token of Qwen2.5-VL covers 28 px, so a square of 16 latents of 8 px is more than four tokens wide.
Group = Annotated[int, Field(gt=0, le=16)]


class Latents(Config):
    """Latents of the autoencoder `backbones.vae`, of about unit variance.

    group: side of the square of latents that makes one target of a token. The image is resized to so many latents, and
    the channels of a square stand behind each other (c * group^2 + dy * group + dx). The released code: 2, with FLUX's
    autoencoder of 8 px, so 64 channels and 16 px for each token.
    """

    kind: Literal["latents"] = "latents"
    group: Group = 1


class Pixels(Config):
    """Pixels of each token's patch, in [-1, 1].

    norm: `patch` gives each patch mean 0 and variance 1, as MAE does (arXiv 2111.06377): structure without brightness.
    """

    kind: Literal["pixels"] = "pixels"
    norm: Literal["none", "patch"] = "none"


class Features(Config):
    """Patch features of a frozen vision encoder (DINOv2, DEiT-III) in the published folder `encoder`.

    norm: `layer` gives each feature vector mean 0 and variance 1 (a layer norm without weights), so that a few channels
    of large variance do not make up the loss.
    """

    kind: Literal["features"] = "features"
    encoder: LocalPath
    norm: Literal["layer", "none"] = "layer"


class LatentToPixel(Config):
    """The head predicts latents, the frozen autoencoder decodes them with gradient, and pixels are compared.

    group: as in `Latents`.
    """

    kind: Literal["latent2pixel"] = "latent2pixel"
    group: Group = 1


Target = Annotated[Latents | Pixels | Features | LatentToPixel, Field(discriminator="kind")]


class _Attending(Config):
    """A head of transformer layers, bidirectional over the tokens of one image."""

    depth: Annotated[Positive, Field(le=1000)] = 3
    width: Annotated[Positive, Field(le=2**16)] = 1024
    heads: Annotated[Positive, Field(le=1000)] = 16

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"recipe.head.width {self.width} must be a multiple of 4 and of its {self.heads} heads")
        return self


class Denoiser(_Attending):
    """A small transformer that predicts the noise in the target (ROSS^D): z_t = sqrt(abar_t) z_0 + sqrt(1-abar_t) eps.

    conditioning: `adaln_zero` modulates every layer by states and time, each token by its own state (the released
    code); `add` sums tokens, states and time before every layer (the paper's figure), and norms states with weights of
    its own.
    """

    kind: Literal["denoiser"] = "denoiser"
    conditioning: Literal["adaln_zero", "add"] = "adaln_zero"
    # Steps of the cosine schedule; the head is trained at all of them.
    timesteps: Annotated[Positive, Field(le=10**6)] = 1000
    # Draws of (t, eps) for each image and step, which share the states and the target.
    repeats: Annotated[Positive, Field(le=1000)] = 4


class Linear(Config):
    """One linear layer that predicts the target itself (ROSS^R) of each token from its state."""

    kind: Literal["linear"]
    metric: Metric = "mse"


class MLP(Config):
    """As `Linear`, with `depth` linear layers."""

    kind: Literal["mlp"]
    depth: Annotated[Positive, Field(le=1000)] = 2
    metric: Metric = "mse"


class Transformer(_Attending):
    """As `Linear`, from the states of all tokens of the image."""

    kind: Literal["transformer"]
    metric: Metric = "mse"


Head = Annotated[Denoiser | Linear | MLP | Transformer, Field(discriminator="kind")]


class ReconstructiveTuning(Objective):
    """ROSS: cross-entropy of the answer plus `weight` times the loss of reconstruction (the paper: 1).

    answers: `sample`: the mean over an answer's tokens, then over the global batch, so a short answer weighs as much as
    a long one; `token`: the sum over all tokens of the global batch by their number. The reconstruction is the mean
    over all images of the global batch. None of them depends on how samples share the devices.
    """

    kind: Literal["reconstructive"]
    weight: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    answers: Literal["sample", "token"] = "sample"

    titles: ClassVar[Mapping[str, str]] = {"reconstructive": "reconstructive tuning"}


class Ross(RecipeConfig):
    """A VLM learns to answer and, with a head, to reconstruct the image.

    target: what is reconstructed; its kind alone (`target: pixels`) stands for it with its defaults. layer: the states
    after this many layers of the language model (0: its input), without the norm; `last`: after all layers and the
    final norm, as the language-model head reads them.
    """

    kind: Literal["ross"] = "ross"
    target: Target = Latents()
    layer: Annotated[int, Field(ge=0)] | Literal["last"] = "last"
    head: Head = Denoiser()

    modules: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "projector": ("vlm.model.visual.merger.", "vlm.model.visual.deepstack_merger_list."),
        "llm": ("vlm.model.language_model.", "vlm.lm_head."),
        "head": ("head.",),
    }
    backbones: ClassVar[tuple[str, ...]] = ("vlm", "vae")
    sharded: ClassVar[tuple[str, ...]] = ("vlm", "head")
    offloadable: ClassVar[tuple[str, ...]] = ("vae",)
    tasks: ClassVar[tuple[Task, ...]] = UNDERSTANDING_TASKS
    objectives: ClassVar[tuple[type[Objective], ...]] = (ReconstructiveTuning,)
    engines: ClassVar[tuple[str, ...]] = ("single", "zero3")
    draws: ClassVar[bool] = False
    adaptable: ClassVar[tuple[str, ...]] = ("llm",)
    does: ClassVar[str] = "answers about an image, and its head restores the image from the language model's states"

    @property
    def optional(self) -> tuple[str, ...]:
        """Pixels and features are made without the autoencoder."""
        return ("vae",) if isinstance(self.target, Pixels | Features) else ()

    @property
    def random(self) -> tuple[str, ...]:
        return ("head",)

    @property
    def quantizable(self) -> Mapping[str, tuple[str, ...]]:
        """The tower without the projector, which can learn; an autoencoder has hardly any linear layers."""
        parts = {"vision": ("vlm.model.visual.blocks",), "llm": ("vlm.model.language_model",)}
        return {**parts, "teacher": ("teacher",)} if self.encoders else parts

    @property
    def encoders(self) -> Mapping[str, Path]:
        return {"teacher": self.target.encoder} if isinstance(self.target, Features) else {}

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, values: Any) -> Any:
        """A target was its kind alone, and an MLP was the one `regressor`."""
        if not isinstance(values, dict):
            return values
        target, head = values.get("target"), values.get("head")
        if isinstance(target, str):
            values = values | {"target": {"kind": str(target)}}
        if isinstance(head, dict) and head.get("kind") == "regressor":
            values = values | {"head": head | {"kind": "mlp"}}
        return values

    @model_validator(mode="after")
    def _check_pair(self) -> Self:
        if self.target.kind == "latent2pixel":
            if isinstance(self.head, Denoiser):
                raise ValueError(
                    "recipe.target latent2pixel decodes predicted latents, and recipe.head denoiser predicts noise; "
                    "valid heads with it: linear, mlp, transformer"
                )
            if self.head.metric == "cosine":
                raise ValueError(
                    "recipe.head.metric cosine compares directions of feature vectors, and recipe.target latent2pixel "
                    "compares colours; valid with it: mse, smooth_l1"
                )
        return self
