"""Recipes: what is trained. One folder per recipe; its `config.py` is free of torch, because the schema imports it."""

# The schema of a curriculum imports each recipe's config, which is built of the schema's basic types: the schema first.
import wemmu.config  # noqa: F401
