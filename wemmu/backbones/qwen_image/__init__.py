"""The MM-DiT of Qwen-Image, diffusers' QwenImageTransformer2DModel."""
