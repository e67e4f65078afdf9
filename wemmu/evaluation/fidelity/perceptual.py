"""LPIPS (arXiv 1801.03924) by the package `lpips`, whose trunk is a network of torchvision's published weights.

The linear weights come with the package. It would download the trunk's; here the user names the file.
"""

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wemmu.checkpoint.manifest import sha256_of
from wemmu.evaluation.benchmark import BenchmarkError

VERSION = "0.1"
# How torchvision's files begin -> the package's name.
TRUNKS = {"alexnet": "alex", "vgg16": "vgg"}
# px: below it nothing is left for AlexNet's last layers.
SMALLEST = 32
_NAME = re.compile(rf"({'|'.join(TRUNKS)})-\w*?-?([0-9a-f]{{8}})\.pth")


class LPIPS:
    """Distance of two images, 0 if they are equal. Nothing of the trunk is loaded before the first distance.

    file: as torchvision publishes it, such as alexnet-owt-7be5be79.pth; the name holds the beginning of its SHA-256.
    """

    def __init__(self, file: Path) -> None:
        """Raise BenchmarkError if the package or the weights are missing, or the file is not what its name says."""
        try:
            import lpips  # noqa: F401
        except ImportError as error:
            raise BenchmarkError("LPIPS needs the package lpips: pip install 'wemmu[lpips]'") from error
        found = _NAME.fullmatch(file.name)
        if not file.is_file() or found is None:
            raise BenchmarkError(
                f"{file} is not a file of torchvision's weights for LPIPS; valid: alexnet-owt-7be5be79.pth or "
                "vgg16-397923af.pth, as torchvision publishes them"
            )
        self._file, self._trunk, self.sha256 = file, TRUNKS[found[1]], sha256_of(file)
        if not self.sha256.startswith(found[2]):
            raise BenchmarkError(f"{file} is damaged or not torchvision's: its SHA-256 begins with {self.sha256[:8]}")
        self._net: Any = None

    def identity(self) -> dict[str, str]:
        """Return the judge for the card."""
        return {"trunk": self._trunk, "sha256": self.sha256, "version": VERSION}

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor) -> float:
        """Return the distance of images [3, H, W] in [0, 1]."""
        if self._net is None:
            self._net = self._loaded()
        return float(self._net(x[None], y[None], normalize=True).item())

    def _loaded(self) -> Any:
        import lpips

        with warnings.catch_warnings():
            # It calls torchvision in a way that is deprecated.
            warnings.simplefilter("ignore", UserWarning)
            net = lpips.LPIPS(net=self._trunk, version=VERSION, pnet_rand=True, verbose=False)
        weights = torch.load(self._file, map_location="cpu", weights_only=True)
        # `features.0.weight` of torchvision is `slice1.0.weight` here.
        names = {name: f"features.{name.partition('.')[2]}" for name in net.net.state_dict()}
        try:
            net.net.load_state_dict({name: weights[published] for name, published in names.items()})
        except (KeyError, RuntimeError) as error:
            raise BenchmarkError(f"{self._file} does not hold the weights of {self._trunk}: {error}") from error
        return net.requires_grad_(False)
