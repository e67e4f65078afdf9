"""Sana, diffusers' SanaTransformer2DModel."""
