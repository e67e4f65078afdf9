"""Caches a frozen encoder's features per image, so that small data sets encode each image once.

The key is the image's content, so all tasks and epochs share it. Results must not depend on the state of the cache, or
a resumed run would differ in the last bit. So missing images are encoded in a batch of the requested size, and the size
is part of the key.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class FeatureCache:
    """Wraps `encode`: pixels uint8 [B, ...] -> features [B, ...]. Remembers `capacity` images, oldest out first.

    Capacity 0 remembers nothing and adds no work.
    """

    def __init__(self, capacity: int = 0):
        self.capacity = capacity
        self._features: OrderedDict[Hashable, Tensor] = OrderedDict()

    def __call__(self, encode: Callable[[Tensor], Tensor], pixels: Tensor, kind: Hashable = None) -> Tensor:
        """Return features of `pixels`; `kind` distinguishes encodings of the same image."""
        # The loader leaves the channels last in memory; that order would show in the last bit.
        pixels = pixels.contiguous()
        if self.capacity == 0:
            return encode(pixels)
        size = len(pixels)
        keys = [
            (kind, size, hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest()) for image in pixels.cpu()
        ]
        missing = {key: i for i, key in enumerate(keys) if key not in self._features}
        found = {key: self._features[key] for key in keys if key not in missing}
        if missing:
            rows = list(missing.values())
            filled = rows + rows[:1] * (size - len(rows))
            encoded = encode(pixels[filled])
            found |= {key: encoded[i].clone() for i, key in enumerate(missing)}
        for key in keys:
            self._features[key] = found[key]
            self._features.move_to_end(key)
        while len(self._features) > self.capacity:
            self._features.popitem(last=False)
        return torch.stack([found[key] for key in keys])
