"""The list of models that can be backbones; add new ones here. Free of torch."""

VLM, AUTOENCODER, TRANSFORMER = "vlm", "vae", "dit"
# Field of `backbones` -> class that a config.json names -> the folder of its adapter in wemmu/backbones.
KNOWN = {
    VLM: {"Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl", "Qwen3VLForConditionalGeneration": "qwen3_vl"},
    AUTOENCODER: {"AutoencoderDC": "dc_ae", "AutoencoderKLQwenImage": "qwen_image_vae"},
    TRANSFORMER: {"SanaTransformer2DModel": "sana", "QwenImageTransformer2DModel": "qwen_image"},
}
# What transformers writes into every config.json -> the class; older ones name it under `architectures`, too.
MODEL_TYPES = {"qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration", "qwen3_vl": "Qwen3VLForConditionalGeneration"}
