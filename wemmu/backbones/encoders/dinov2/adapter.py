"""DINOv2: facebook/dinov2-large, and the variants with registers."""

from typing import Any, ClassVar

from transformers import Dinov2Model, Dinov2WithRegistersModel

from wemmu.backbones.encoders.vit import ViT


class DINOv2(ViT):
    """See `wemmu.backbones.encoders.encoder.EncoderAdapter`."""

    classes: ClassVar[dict[str, type[Any]]] = {
        "Dinov2Model": Dinov2Model,
        "Dinov2WithRegistersModel": Dinov2WithRegistersModel,
    }


ADAPTER = DINOv2()
