"""Frozen image encoders behind one interface: for rewards, metrics and teachers."""

from wemmu.backbones.encoders.encoder import ImageEncoder, cosine, encoder_without_weights, load_encoder

__all__ = ["ImageEncoder", "cosine", "encoder_without_weights", "load_encoder"]
