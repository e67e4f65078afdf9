"""What is trained and why: a folder for each recipe. Its `config.py` is free of torch, for every config names it."""

# The schema of a curriculum imports each recipe's config, which is built of the schema's basic types: the schema first.
import wemmu.config  # noqa: F401
