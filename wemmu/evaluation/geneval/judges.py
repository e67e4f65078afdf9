"""GenEval's judges: Mask2Former for the objects, CLIP for their colours; both by transformers, from published folders.

The publication runs Mask2Former by mmdetection; the weights and the post-processing are those of its port.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPModel,
    Mask2FormerForUniversalSegmentation,
)

from wemmu.backbones.weights import load_strict
from wemmu.evaluation.benchmark import BenchmarkError
from wemmu.evaluation.geneval.rules import CONFIDENCE, Detection

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
# Constants that earlier versions of transformers stored.
CONSTANTS = ("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids")
# Around the object, where its background was.
GRAY = (153, 153, 153)


class Detector:
    """A Mask2Former for instances of COCO's classes. classes: GenEval's names in the order of the detector's labels."""

    def __init__(self, folder: Path, classes: Sequence[str], device: str):
        self.model: Any
        self.model, report = load_strict(Mask2FormerForUniversalSegmentation, folder, torch.float32)
        self.model.eval().to(device)
        self.processor = _processor(folder)
        self.classes, self.device, self.sha256 = list(classes), device, report.sha256
        labels = self.model.config.num_labels
        if labels != len(self.classes):
            raise BenchmarkError(
                f"{folder} detects {labels} classes, object_names.txt lists {len(self.classes)}; GenEval needs a "
                "Mask2Former for COCO instances, such as facebook/mask2former-swin-small-coco-instance"
            )

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> dict[str, list[Detection]]:
        """Return class -> detections above the lowest confidence of any task."""
        inputs = self.processor(images=image, return_tensors="pt").to(self.device)
        outputs = self.model(**inputs)
        (found,) = self.processor.post_process_instance_segmentation(
            outputs, threshold=CONFIDENCE, target_sizes=[(image.height, image.width)], return_binary_maps=True
        )
        detections: dict[str, list[Detection]] = defaultdict(list)
        maps = found["segmentation"]
        for segment, mask in zip(found["segments_info"], () if maps is None else maps, strict=False):
            cells = mask.cpu().numpy() > 0.5
            if not cells.any():
                continue
            rows, columns = np.nonzero(cells)
            box = (float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1))
            detections[self.classes[segment["label_id"]]].append(Detection(box, float(segment["score"]), cells))
        return detections


class ColorJudge:
    """Zero-shot CLIP: the nearest of ten colours for the crop of an object."""

    def __init__(self, folder: Path, device: str):
        self.model: Any
        self.model, report = load_strict(CLIPModel, folder, torch.float32, CONSTANTS)
        self.model.eval().to(device)
        self.processor = _processor(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)  # type: ignore[no-untyped-call]
        self.device, self.sha256 = device, report.sha256
        self._classes: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, image: Image.Image, name: str, detections: Sequence[Detection]) -> list[str]:
        """Return the colour of each detection of a class."""
        crops = [_crop(image, detection) for detection in detections]
        pixels = self.processor(images=crops, return_tensors="pt")["pixel_values"].to(self.device)
        features = torch.nn.functional.normalize(self.model.get_image_features(pixel_values=pixels), dim=-1)
        return [COLORS[i] for i in (features @ self._colors(name).T).argmax(1).tolist()]

    def _colors(self, name: str) -> torch.Tensor:
        """Text features of the colours for a class, [10, D]: normalised means over the templates."""
        if name not in self._classes:
            rows = []
            for color in COLORS:
                texts = [template.format(color=color, name=name) for template in TEMPLATES]
                tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
                given = {key: tokens[key] for key in ("input_ids", "attention_mask")}
                features = torch.nn.functional.normalize(self.model.get_text_features(**given), dim=-1)
                rows.append(torch.nn.functional.normalize(features.mean(0), dim=-1))
            self._classes[name] = torch.stack(rows)
        return self._classes[name]


def _crop(image: Image.Image, detection: Detection) -> Image.Image:
    """Cut out an object, on gray."""
    x0, y0, x1, y1 = (round(value) for value in detection.box)
    mask = Image.fromarray(detection.mask)
    return Image.composite(image, Image.new("RGB", image.size, GRAY), mask).crop((x0, y0, x1, y1))


def _processor(folder: Path) -> Any:
    return AutoImageProcessor.from_pretrained(folder, use_fast=True)  # type: ignore[no-untyped-call]
