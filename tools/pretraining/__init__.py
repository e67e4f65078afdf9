"""Recipes that pre-train the tiny backbones of the shapes world; run by tools/pretrain_shapes.py."""
