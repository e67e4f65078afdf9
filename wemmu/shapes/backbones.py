"""The tiny backbones of the miniature world, as configurations of the REAL classes.

`tools/pretrain_shapes.py` trains them; they are shipped under `assets/shapes` in the layout of the published
checkpoints (`Qwen2.5-VL-3B-Instruct`, `Sana_1600M_1024px_diffusers`), and every part of the project loads them exactly
as it loads the real ones.

Two sizes differ from the real ones on purpose (docs/method.md, "The miniature"): `rope_theta` is 100 instead of 1e6,
because with heads of 32 channels the slow axes of M-RoPE would not turn at all across a grid of 4 tokens; and the
autoencoder has 16 px to a latent like the 16 px to a VLM token, so that both grids are equal without resizing (32 and
28 px in the published ones).
"""

from typing import Any

PATCH_PX = 8
MERGE = 2
# px per VLM token and per latent.
TOKEN_PX = PATCH_PX * MERGE
LATENT_PX = 16
# The two resolutions of the curriculum.
LOW_PX, HIGH_PX = 32, 64

VLM_WIDTH = 128
# The image encoders: 4 x 4 patches of an image of HIGH_PX, the grid of the VLM and of the latents.
ENCODER_WIDTH, ENCODER_PATCH_PX = 96, 16
CAPTION_WIDTH = 128


def vlm_config(vocab_size: int, token_ids: dict[str, int]) -> dict[str, Any]:
    """Return arguments of `Qwen2_5_VLConfig`. `token_ids` maps the special tokens' names in that config to ids."""
    return {
        "text_config": {
            "vocab_size": vocab_size,
            "hidden_size": VLM_WIDTH,
            "intermediate_size": 320,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rope_theta": 100.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 4, 10]},
            "tie_word_embeddings": True,
            "bos_token_id": token_ids["bos_token_id"],
            "eos_token_id": token_ids["eos_token_id"],
        },
        "vision_config": {
            "depth": 3,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_heads": 4,
            "patch_size": PATCH_PX,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "window_size": LOW_PX,
            "fullatt_block_indexes": [0, 1, 2],
            "out_hidden_size": VLM_WIDTH,
        },
        "tie_word_embeddings": True,
        **{k: v for k, v in token_ids.items() if k not in ("bos_token_id", "eos_token_id")},
    }


VAE_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    # The first width is a placeholder: without layers of its own it becomes the stride-2 stem.
    "encoder_block_out_channels": (16, 24, 48, 96, 96),
    "decoder_block_out_channels": (16, 24, 48, 96, 96),
    "encoder_layers_per_block": (0, 1, 1, 1, 1),
    "decoder_layers_per_block": (0, 1, 1, 2, 1),
    "encoder_qkv_multiscales": ((), (), (), (), ()),
    "decoder_qkv_multiscales": ((), (), (), (), ()),
    "upsample_block_type": "interpolate",
    "downsample_block_type": "conv",
}

DIT_CONFIG: dict[str, Any] = {
    "in_channels": 32,
    "out_channels": 32,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "num_layers": 6,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 32,
    "cross_attention_dim": 128,
    "caption_channels": CAPTION_WIDTH,
    "mlp_ratio": 2.5,
    "sample_size": HIGH_PX // LATENT_PX,
    "patch_size": 1,
    "interpolation_scale": 1.0,
}

# Sana's own text encoder, here only to pre-train the DiT and to keep its directory complete (a stock `SanaPipeline`
# loads it); the bridge replaces it.
TEXT_ENCODER_CONFIG: dict[str, Any] = {
    "hidden_size": CAPTION_WIDTH,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "query_pre_attn_scalar": 32,
    "sliding_window": 128,
}
