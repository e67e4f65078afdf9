"""CLIP and LongCLIP: the vision tower with its projection."""
