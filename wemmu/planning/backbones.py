"""The sizes of the backbones, from the config.json files of their directories; defaults are the libraries' own.

Of the published backbones these files are in the package, so that a run can be planned before they are on a disk.
"""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from wemmu.config.grid import token_grid
from wemmu.config.schema import Backbones
from wemmu.published.check import check_class
from wemmu.published.configs import packaged
from wemmu.published.known import AUTOENCODER, TRANSFORMER, VLM
from wemmu.published.layout import BackboneError

Schema = TypeVar("Schema", bound=BaseModel)


class PlanError(ValueError):
    """A plan that cannot be made; the message says what is missing or which choices are valid."""


class _Sizes(BaseModel):
    """The fields of a config.json that shapes follow from; it holds others too."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Vision(_Sizes):
    """`vision_config` of Qwen2.5-VL. patch_size, window_size: px."""

    depth: int
    hidden_size: int
    intermediate_size: int
    in_channels: int = 3
    patch_size: int
    spatial_merge_size: int
    temporal_patch_size: int
    window_size: int
    fullatt_block_indexes: tuple[int, ...]
    out_hidden_size: int

    @property
    def token_px(self) -> int:
        return self.patch_size * self.spatial_merge_size

    def side(self, px: int) -> int:
        """Tokens along a side of `px` px; 0 if it is shorter than one."""
        return token_grid(px, px, self.token_px)[0] if px >= self.token_px else 0


class Language(_Sizes):
    """The language model of Qwen2.5-VL: fields at the top of the published config.json, in `text_config` of later."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool = False

    @property
    def kv_width(self) -> int:
        return self.hidden_size // self.num_attention_heads * self.num_key_value_heads


class Sana(_Sizes):
    """diffusers' SanaTransformer2DModel."""

    in_channels: int = 32
    out_channels: int | None = 32
    num_attention_heads: int = 70
    attention_head_dim: int = 32
    num_layers: int = 20
    num_cross_attention_heads: int = 20
    cross_attention_head_dim: int = 112
    cross_attention_dim: int = 2240
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    attention_bias: bool = False
    patch_size: int = 1
    norm_elementwise_affine: bool = False
    guidance_embeds: bool = False
    qk_norm: str | None = None

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def cross_width(self) -> int:
        return self.num_cross_attention_heads * self.cross_attention_head_dim

    @property
    def hidden(self) -> int:
        """Channels of one half of the gated feed-forward."""
        return int(self.mlp_ratio * self.width)


class DCAE(_Sizes):
    """diffusers' AutoencoderDC; a string of block types stands for all blocks."""

    in_channels: int = 3
    latent_channels: int = 32
    attention_head_dim: int = 32
    encoder_block_types: str | tuple[str, ...] = "ResBlock"
    decoder_block_types: str | tuple[str, ...] = "ResBlock"
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    upsample_block_type: str = "pixel_shuffle"
    downsample_block_type: str = "pixel_unshuffle"

    @property
    def latent_px(self) -> int:
        return int(2 ** (len(self.encoder_block_out_channels) - 1))


class Sizes(_Sizes):
    vision: Vision
    language: Language
    dit: Sana
    vae: DCAE
    # Directories that are not there, whose published sizes were taken by their names.
    packaged: tuple[Path, ...] = ()


def read_sizes(backbones: Backbones) -> Sizes:
    """Read the three config.json files that the curriculum's directories hold; weights are not looked at.

    Of a directory that is not there and bears the name of a published backbone, those of the package.

    Raises:
        PlanError: naming every file that is not there, or the field of one that cannot be planned with.
    """
    wanted = backbones.vlm, backbones.dit, backbones.vae
    folders = [path if path is None or path.exists() else _packaged(path) or path for path in wanted]
    absent = tuple(path for path, used in zip(wanted, folders, strict=True) if path is not None and path != used)
    vlm, dit, vae = (folder / "config.json" for folder in folders if folder is not None)
    if missing := [file for file in (vlm, dit, vae) if not file.is_file()]:
        raise PlanError(
            f"to plan, these files are needed and not there: {', '.join(map(str, missing))}. backbones.vlm, "
            "backbones.dit and backbones.vae name directories in the published layout (Qwen2.5-VL-3B-Instruct; "
            "transformer and vae of Sana_1600M_1024px_diffusers); of these only the config.json files are read"
        )
    qwen = _read(vlm, _Qwen, VLM)
    text = qwen.text_config or _read(vlm, Language, VLM)
    transformer = _supported(_read(dit, Sana, TRANSFORMER), dit)
    autoencoder = _read(vae, DCAE, AUTOENCODER)
    return Sizes(vision=qwen.vision_config, language=text, dit=transformer, vae=autoencoder, packaged=absent)


def _packaged(path: Path) -> Path | None:
    """The package's copy of a published directory, or of one inside a published pipeline, by its name."""
    inside = packaged(path.parent.name)
    return packaged(path.name) or (inside / path.name if inside is not None else None)


class _Qwen(_Sizes):
    vision_config: Vision
    text_config: Language | None = None


def _read(file: Path, schema: type[Schema], kind: str) -> Schema:
    try:
        check_class(file, kind)
        return schema.model_validate_json(file.read_text(encoding="utf-8"))
    except BackboneError as error:
        raise PlanError(str(error)) from error
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors()]
        raise PlanError(f"{file} is not as it is published: {'; '.join(lines)}") from error


def _supported(dit: Sana, file: Path) -> Sana:
    if dit.qk_norm not in (None, "rms_norm_across_heads"):
        raise PlanError(f"{file}: qk_norm {dit.qk_norm!r} is not known; valid: null, 'rms_norm_across_heads'")
    return dit
