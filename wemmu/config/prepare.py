"""What `data_pipeline` writes: from which sources, at which sizes, and which records it rejects.

Paths are local or anything fsspec opens (`s3://...`, `hf://...`) and may hold wildcards.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, field_validator, model_validator

from wemmu.config.base import Config, Count, LocalPath, Location, Positive, Seed, Share
from wemmu.config.task import EDITS, Task

# A ratio of the longer to the shorter side, at least 1.
Ratio = Annotated[float, Field(ge=1)]
# `wemmu.shapes`: how a caption describes places, and kinds of single-image edits.
Wording = Literal["placed", "unplaced", "related"]
EditKind = Literal["recolor", "reshape", "resize", "move", "add", "remove", "background"]


class _Source(Config):
    # Part of record ids and reports; unique in a data set.
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_\-]+$")]

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that the source can have records of."""
        return (Task.T2I,)


class StoredSource(_Source):
    """Records that lie at `path`: files, whose names may have wildcards, or a folder unless `of_files`."""

    path: Location
    of_files: ClassVar[bool] = True


class _ImageSource(_Source):
    """Images with or without captions. The task `caption` needs none; t2i drops images without."""

    task: Literal["t2i", "caption"] = "t2i"

    @property
    def tasks(self) -> tuple[Task, ...]:
        return (Task(self.task),)


class CaptionedSource(_ImageSource):
    """Rows of an image and a caption; `caption` null: no captions."""

    image: str = "image"
    caption: str | None = "caption"


class ShapesSource(_Source):
    """The built-in miniature: `samples` records of each task.

    `edits` weights the kinds of single-image edits, in any unit; empty: all equal. `captions` weights the ways in which
    a text-to-image caption describes places; empty: as in evaluation. `sizes` are (height, width) px: a record draws
    one for its target and first input, and one for each further input; empty: all are square.
    """

    kind: Literal["shapes"]
    name: str = "shapes"
    samples: dict[Task, Positive]
    edits: dict[EditKind, PositiveFloat] = Field(default_factory=dict)
    captions: dict[Wording, PositiveFloat] = Field(default_factory=dict)
    sizes: tuple[tuple[Positive, Positive], ...] = ()
    seed: Seed = 0

    @property
    def tasks(self) -> tuple[Task, ...]:
        return tuple(self.samples)


class WebDatasetSource(StoredSource, _ImageSource):
    """Tar files of img2dataset or WebDataset: members with the same stem are one record, an image and its caption.

    `caption` lists places of the caption; the first non-empty one counts. `txt` is the text of that member,
    `json:caption` the field `caption` of the member `json`. Empty: there are no captions.
    """

    kind: Literal["webdataset"]
    caption: tuple[Annotated[str, Field(pattern=r"^(\w+|json:.+)$")], ...] = ("txt", "json:caption")


class TableSource(StoredSource):
    """Files of rows. An image is bytes, Hugging Face's {bytes, path}, or a path.

    Paths are relative to `root`, or absolute and below it (default: the folder of the file that names them). After
    resolving links they must lie below the root or one of `also_below`. Links of a Hugging Face snapshot to the `blobs`
    beside it are allowed.
    """

    root: Location | None = None
    also_below: tuple[Location, ...] = ()


class ParquetSource(TableSource, CaptionedSource):
    """Parquet files of images and captions; `caption` null: no captions. Paths need a `root`."""

    kind: Literal["parquet"]


class FolderSource(TableSource, CaptionedSource):
    """Images listed in JSONL, a JSON array or Parquet; `caption` null: no captions.

    With `answer` these are understanding records, and `caption` is the field of the question. Both may name a field of
    conversations (`[{from: human, value: ...}, {from: gpt, value: ...}]`).
    """

    kind: Literal["folder"]
    answer: str | None = None

    @property
    def tasks(self) -> tuple[Task, ...]:
        return (Task.UNDERSTANDING,) if self.answer else super().tasks

    @model_validator(mode="after")
    def _check_task(self) -> Self:
        if self.answer and self.task == "caption":
            raise ValueError(f"source {self.name}: answer makes understanding records; leave it out for task: caption")
        return self


class ConversationsSource(TableSource):
    """Conversations about images as LLaVA and Cambrian publish them, in JSON, JSONL or Parquet: understanding records.

    `conversations` alternates human and model, any number of turns. `image` is one image, a list of them, or missing
    for a conversation of words alone; all stand before the first question, whose `<image>` marks are removed.
    """

    kind: Literal["conversations"]
    image: str = "image"
    conversations: str = "conversations"

    @property
    def tasks(self) -> tuple[Task, ...]:
        return (Task.UNDERSTANDING,)


class EditsSource(TableSource):
    """Edit records in JSONL, a JSON array or Parquet: an instruction, one or several input images, a target.

    One of several instructions is used; of a conversation, the human's turn. If `input` and `target` are the same
    field, its last image is the target.
    """

    kind: Literal["edits"]
    instruction: str = "instruction"
    input: str = "input"
    target: str = "target"

    @property
    def tasks(self) -> tuple[Task, ...]:
        return EDITS


class HuggingFaceSource(StoredSource, CaptionedSource):
    """A data set that `datasets` saved with `save_to_disk`; `split` picks one of a DatasetDict."""

    kind: Literal["huggingface"]
    of_files: ClassVar[bool] = False
    split: str | None = None
    caption: str | None = "text"


Source = Annotated[
    ShapesSource
    | WebDatasetSource
    | ParquetSource
    | FolderSource
    | ConversationsSource
    | EditsSource
    | HuggingFaceSource,
    Field(discriminator="kind"),
]


class ImageSizing(Config):
    """Aspect-ratio buckets, and the format of stored images.

    At resolution R a bucket is a size of about R^2 pixels whose sides are multiples of `unit`. An image goes to the
    bucket with the nearest aspect ratio: it is scaled until it covers the bucket, then cropped evenly on both sides.
    Inputs of an edit have buckets of their own (`wemmu.config.buckets`). An image that needs more enlargement than
    `max_upscale` is not used at that resolution.
    """

    # px; Sana's autoencoder makes one latent of 32 x 32.
    unit: Positive = 32
    # Largest ratio of longer to shorter side of a bucket; 1 allows only the square.
    max_aspect: Ratio = 2.0
    max_upscale: Annotated[float, Field(gt=0)] = 1.0
    # JPEG at 95 without chroma subsampling is visually lossless at a tenth of PNG's bytes on photographs.
    format: Literal["jpeg", "png"] = "jpeg"
    quality: Annotated[int, Field(ge=1, le=100)] = 95


class Keep(Config):
    """Which records are kept; rejected.jsonl lists the others with the reason."""

    # px of the shorter side, for every image of a record.
    min_side: Positive = 1
    max_aspect: Ratio = 4.0
    # Characters of the prompt, for tasks with one.
    caption_length: tuple[Count, Positive] = (1, 4000)
    # Records whose images (and, for edits, instruction) equal those of an earlier record byte by byte. Dropping them
    # reads every source once more before writing.
    duplicates: Literal["drop", "keep"] = "drop"
    # An image with more pixels is not decoded: it may be a decompression bomb.
    max_pixels: Positive = 100_000_000

    @field_validator("caption_length")
    @classmethod
    def _ordered(cls, value: tuple[int, int]) -> tuple[int, int]:
        if value[0] > value[1]:
            raise ValueError(f"the minimum {value[0]} is above the maximum {value[1]}")
        return value


class Captioner(Config):
    """A VLM (a directory in the published layout) writes captions of text-to-image records.

    `which`: only missing captions, or all. Those of the shapes are exact and stay.
    """

    vlm: LocalPath
    instruction: str = "Describe the image."
    max_tokens: Positive = 128
    which: Literal["missing", "all"] = "missing"
    batch: Positive = 16


class Latents(Config):
    """Store the autoencoder's latents beside the images, so that training does not encode them."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    batch: Positive = 16


class Prepare(Config):
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    images: ImageSizing = ImageSizing()
    keep: Keep = Keep()
    caption: Captioner | None = None
    latents: Latents | None = None
    # More tasks to write, which no stage uses, at every resolution of the stages.
    also: tuple[Task, ...] = ()
    # Share of damaged records above which writing stops: then the source itself is probably wrong.
    max_damaged: Share = 0.05
    # Number of containers (tar, Parquet and list files, Hugging Face folders) that may be unreadable, whole or in part.
    # A container may hold any number of records, so a share of records cannot measure the loss.
    max_lost_containers: Count = 0
    # Records of one partition, the unit of parallel work, which a killed run repeats. A tar file or a Parquet row group
    # is never split.
    partition: Positive = 2000

    @model_validator(mode="after")
    def _check(self) -> "Prepare":
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"two sources have one name: {', '.join(names)}")
        return self
