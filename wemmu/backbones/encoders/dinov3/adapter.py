"""DINOv3: facebook/dinov3-vitl16-pretrain-lvd1689m."""

from typing import Any, ClassVar

from transformers import DINOv3ViTModel

from wemmu.backbones.encoders.vit import ViT


class DINOv3(ViT):
    """See `wemmu.backbones.encoders.encoder.EncoderAdapter`."""

    classes: ClassVar[dict[str, type[Any]]] = {"DINOv3ViTModel": DINOv3ViTModel}


ADAPTER = DINOv3()
