"""The autoencoder of Qwen-Image, diffusers' AutoencoderKLQwenImage."""
