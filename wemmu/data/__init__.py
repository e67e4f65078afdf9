"""Reading: shards of several tasks -> the micro-batches of any optimizer step."""

from wemmu.data.loader import Loader

__all__ = ["Loader"]
