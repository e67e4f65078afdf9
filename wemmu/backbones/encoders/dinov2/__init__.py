"""DINOv2, with and without registers."""
