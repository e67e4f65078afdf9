"""Frozen image encoders behind one interface: for rewards, metrics and teachers."""

from wemmu.backbones.encoders.encoder import ImageEncoder, cosine, load_encoder

__all__ = ["ImageEncoder", "cosine", "load_encoder"]
