"""ViTs in classes of transformers."""
