"""DINOv3 (ViT)."""
