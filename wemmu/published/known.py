"""The list of models that can be backbones; add new ones here. Free of torch."""

VLM, AUTOENCODER, TRANSFORMER, ENCODER = "vlm", "vae", "dit", "encoder"
# Field of `backbones` -> class that a config.json names -> the folder of its adapter in wemmu/backbones.
KNOWN = {
    VLM: {"Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl", "Qwen3VLForConditionalGeneration": "qwen3_vl"},
    AUTOENCODER: {
        "AutoencoderDC": "dc_ae",
        "AutoencoderKL": "autoencoder_kl",
        "AutoencoderKLQwenImage": "qwen_image_vae",
    },
    TRANSFORMER: {"SanaTransformer2DModel": "sana", "QwenImageTransformer2DModel": "qwen_image"},
    # Frozen image encoders: rewards, metrics and teachers. timm names an architecture; only its family is compared.
    ENCODER: {
        "CLIPModel": "encoders.clip",
        "CLIPVisionModelWithProjection": "encoders.clip",
        "Dinov2Model": "encoders.vit",
        "Dinov2WithRegistersModel": "encoders.vit",
        "DINOv3ViTModel": "encoders.vit",
        "deit3": "encoders.deit3",
    },
}
# What transformers writes into every config.json -> the class; older ones name it under `architectures`, too.
MODEL_TYPES = {
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "clip": "CLIPModel",
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
}
