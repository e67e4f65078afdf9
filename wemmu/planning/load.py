"""What a stage asks of its ranks: sizes of the model, how it is split, and what a rank does in a step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from wemmu.config.schema import Curriculum
from wemmu.config.stage import Rung
from wemmu.planning import padding
from wemmu.planning.backbones import Sizes
from wemmu.planning.flops import Sample
from wemmu.planning.parameters import Part, dit_block, language_layer

FP32 = 4
BRIDGE: tuple[Part, ...] = ("pathway", "vae_branch", "queries", "position_mlp")
# Elements, as `wemmu.parallel.zero3` has them: ZeRO-3 keeps so many gathered, and reduces gradients in such buckets.
LIVE = 1_000_000_000
BUCKET = 50_000_000


@dataclass(frozen=True)
class Degrees:
    """Ranks in all, each with samples of its own; tensor and pipeline parallel degree of the DiT; copies of the DiT."""

    world: int
    tp: int
    pp: int

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.pp)

    @property
    def split(self) -> bool:
        """Whether the DiT is, which only the hybrid engine does."""
        return self.tp * self.pp > 1

    def shards(self, part: Part) -> int:
        """Ranks over which what a rank has of a part is sharded."""
        if part == "dit":
            return self.dp
        return self.world if part in BRIDGE else 1


def weight_bytes(curriculum: Curriculum) -> int:
    """Bytes of a number in frozen and in working weights."""
    return {"float32": 4, "bfloat16": 2}[curriculum.backbones.dtype]


@dataclass(frozen=True)
class Load:
    """A stage on so many ranks.

    parameters: of the whole model. micro: samples that a rank has at once, `accumulation` times a step. samples: what a
    sample is like, of each task.
    """

    curriculum: Curriculum
    stage: Rung
    sizes: Sizes
    parameters: Mapping[Part, int]
    degrees: Degrees
    micro: int
    accumulation: int
    samples: tuple[Sample, ...]

    @property
    def width(self) -> int:
        """Bytes of a number in frozen and in working weights."""
        return weight_bytes(self.curriculum)

    @property
    def bridge(self) -> int:
        """Parameters of all of its parts."""
        return sum(self.parameters[part] for part in BRIDGE)

    @property
    def layers(self) -> int:
        """Of the pathway."""
        return self.sizes.language.num_hidden_layers

    @property
    def layer(self) -> int:
        """Parameters of one of them."""
        return language_layer(self.sizes.language).parameters

    @property
    def blocks(self) -> int:
        """Of the DiT, in its first pipeline stage."""
        return math.ceil(self.sizes.dit.num_layers / self.degrees.pp)

    @cached_property
    def share(self) -> dict[Part, int]:
        """Parameters that the first pipeline stage of one tensor rank has a part in, zero heads among them."""
        dit = self.sizes.dit
        ends = self.parameters["dit"] - dit_block(dit).parameters * dit.num_layers
        return {**self.parameters, "dit": ends + dit_block(dit, self.degrees.tp).parameters * self.blocks}

    @cached_property
    def padding(self) -> dict[Part, int]:
        """Numbers that FSDP2 adds to the parts that it shards, to all of one tensor rank's first pipeline stage."""
        if not self.degrees.split:
            return {}
        sizes, degrees = self.sizes, self.degrees
        block = padding.added(padding.dit_block(sizes.dit, degrees.tp), degrees.dp)
        ends = padding.added(padding.dit_ends(sizes.dit, True, degrees.pp == 1), degrees.dp)
        return {
            "pathway": padding.added(padding.language_layer(sizes.language), degrees.world) * self.layers,
            "position_mlp": padding.added(padding.rest_of_bridge(sizes, self.curriculum.recipe.bridge), degrees.world),
            "dit": block * self.blocks + ends,
        }
