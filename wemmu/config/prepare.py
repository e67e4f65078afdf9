"""What `data_pipeline` is asked to write: from which sources, at which sizes, and what is left out.

Paths are local or anything fsspec opens (`s3://...`, `hf://...`); those that name many files may hold wildcards.
"""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, field_validator, model_validator

from wemmu.config.base import Config, LocalPath, Location, Positive, Seed, Share
from wemmu.config.task import Task

# At least 1: a ratio of the longer to the shorter side, or of the new to the old.
Ratio = Annotated[float, Field(ge=1)]
# What `wemmu.shapes` can make of a scene: ways in which a caption tells where things are, and edits of one picture.
Wording = Literal["placed", "unplaced", "related"]
EditKind = Literal["recolor", "reshape", "resize", "move", "add", "remove", "background"]


class _Source(Config):
    # Stands in the ids of the records and in reports; two sources of one data set need different ones.
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_\-]+$")]

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks of which the source can have records."""
        return (Task.T2I,)


class ShapesSource(_Source):
    """The built-in miniature world, endless: `samples` records of each task.

    `edits` gives the share of each kind of single-image edit, in any unit; empty: all alike. `captions` does so for the
    ways in which a text-to-image caption tells where things are; empty: as in evaluation.
    """

    kind: Literal["shapes"]
    name: str = "shapes"
    samples: dict[Task, Positive]
    edits: dict[EditKind, PositiveFloat] = Field(default_factory=dict)
    captions: dict[Wording, PositiveFloat] = Field(default_factory=dict)
    seed: Seed = 0

    @property
    def tasks(self) -> tuple[Task, ...]:
        return tuple(self.samples)


class WebDatasetSource(_Source):
    """Tar files of img2dataset or WebDataset: members of one stem are one record, a picture and its caption.

    `caption` lists where the caption may stand, the first that is there and not empty counts: `txt` is that member's
    whole text, `json:caption` is the field `caption` of the member `json`. Empty: there are none.
    """

    kind: Literal["webdataset"]
    path: Location
    caption: tuple[Annotated[str, Field(pattern=r"^(\w+|json:.+)$")], ...] = ("txt", "json:caption")


class _Table(_Source):
    """Files of rows. A picture is its bytes, Hugging Face's {bytes, path}, or a path.

    Paths are relative to `root`, or absolute and below it (default: the folder of the file that names them). They may
    lead, by links too, only below the root, or below one of `also_below`: links of a Hugging Face snapshot, which lead
    to the `blobs` beside it, need no mention.
    """

    path: Location
    root: Location | None = None
    also_below: tuple[Location, ...] = ()


class ParquetSource(_Table):
    """Parquet files of pictures and captions; `caption` null: they have none. Paths need a `root`."""

    kind: Literal["parquet"]
    image: str = "image"
    caption: str | None = "caption"


class FolderSource(_Table):
    """Pictures that JSONL, a JSON array or Parquet lists; `caption` null: they have none.

    With `answer` the records are of the understanding task: `caption` is then the field of the question. A field of
    conversations (`[{from: human, value: ...}, {from: gpt, value: ...}]`) can be named for both.
    """

    kind: Literal["folder"]
    image: str = "image"
    caption: str | None = "caption"
    answer: str | None = None

    @property
    def tasks(self) -> tuple[Task, ...]:
        return (Task.UNDERSTANDING,) if self.answer else (Task.T2I,)


class EditsSource(_Table):
    """Edit records in JSONL, a JSON array or Parquet: an instruction, one or several input pictures, a target.

    Of several instructions one is taken; of a conversation what the human says. Where `input` and `target` are one
    field, its last picture is the target.
    """

    kind: Literal["edits"]
    instruction: str = "instruction"
    input: str = "input"
    target: str = "target"

    @property
    def tasks(self) -> tuple[Task, ...]:
        return (Task.EDIT, Task.MULTI_EDIT)


class HuggingFaceSource(_Source):
    """A data set that `datasets` saved with `save_to_disk`; `split` picks one of a DatasetDict."""

    kind: Literal["huggingface"]
    path: Location
    split: str | None = None
    image: str = "image"
    # null: there are none.
    caption: str | None = "text"


Source = Annotated[
    ShapesSource | WebDatasetSource | ParquetSource | FolderSource | EditsSource | HuggingFaceSource,
    Field(discriminator="kind"),
]


class Pictures(Config):
    """Aspect-ratio buckets, and how the pictures in them are stored.

    At resolution R a bucket is a size of about R^2 pixels whose sides are multiples of `unit`. A picture goes to the
    bucket nearest to its own aspect ratio: scaled until it covers the bucket, then cut evenly on both sides. One that
    would have to be enlarged by more than `max_upscale` is not used at that resolution.
    """

    # px; Sana's autoencoder makes one latent of 32 x 32.
    unit: Positive = 32
    # Longer to shorter side of the most oblong bucket; 1 leaves only the square.
    max_aspect: Ratio = 2.0
    max_upscale: Annotated[float, Field(gt=0)] = 1.0
    # JPEG at 95 without chroma subsampling is visually lossless at a tenth of PNG's bytes on photographs.
    format: Literal["jpeg", "png"] = "jpeg"
    quality: Annotated[int, Field(ge=1, le=100)] = 95


class Keep(Config):
    """What is kept; everything else is listed in rejected.jsonl with its reason."""

    # px of the shorter side, of every picture of a record.
    min_side: Positive = 1
    max_aspect: Ratio = 4.0
    # Characters of the prompt, for tasks that have one.
    caption_length: tuple[Annotated[int, Field(ge=0)], Positive] = (1, 4000)
    # Records whose pictures (and, for edits, instruction) are byte by byte those of an earlier record. Dropping them
    # reads every source once more before anything is written.
    duplicates: Literal["drop", "keep"] = "drop"
    # A picture with more pixels is not decoded at all: its file may be a decompression bomb.
    max_pixels: Positive = 100_000_000

    @field_validator("caption_length")
    @classmethod
    def _ordered(cls, value: tuple[int, int]) -> tuple[int, int]:
        if value[0] > value[1]:
            raise ValueError(f"the shortest length, {value[0]}, is above the longest, {value[1]}")
        return value


class Captioner(Config):
    """Have a VLM (a directory in the published layout) write captions of text-to-image records.

    `which`: of those that have none, or of all.
    """

    vlm: LocalPath
    instruction: str = "Describe the image."
    max_tokens: Positive = 128
    which: Literal["missing", "all"] = "missing"
    batch: Positive = 16


class Latents(Config):
    """Store the autoencoder's latents beside the pictures, so that training need not encode them."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    batch: Positive = 16


class Prepare(Config):
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    pictures: Pictures = Pictures()
    keep: Keep = Keep()
    caption: Captioner | None = None
    latents: Latents | None = None
    # Tasks that no stage mixes and that are written all the same, at every resolution of the stages.
    also: tuple[Task, ...] = ()
    # Share of damaged records above which writing stops: by then the source is probably not what it should be.
    max_damaged: Share = 0.05
    # Containers (tar, Parquet and list files, Hugging Face folders) of which all or the rest cannot be read. Each may
    # hold any number of records, so no share of records tells what was lost.
    max_lost_containers: Annotated[int, Field(ge=0)] = 0
    # Records of one partition, the unit of parallel work and of what a killed run does again; a tar file or a Parquet
    # row group is never split.
    partition: Positive = 2000

    @model_validator(mode="after")
    def _check(self) -> "Prepare":
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"two sources have one name: {', '.join(names)}")
        return self
