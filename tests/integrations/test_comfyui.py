"""The nodes, used as ComfyUI uses them: by NODE_CLASS_MAPPINGS, INPUT_TYPES, FUNCTION and RETURN_TYPES."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.export.conftest import exported, pipe, trained
from tests.export.fresh import noise_image
from wemmu.pipeline import WeMMUPipeline
from wemmu.published.layout import BackboneError

__all__ = ["exported", "pipe", "trained"]
FOLDER = Path(__file__).resolve().parents[2] / "integrations" / "comfyui"
SIZE = {"height": 32, "width": 32, "steps": 2}


@pytest.fixture(scope="module")
def nodes() -> dict[str, Any]:
    """As ComfyUI loads a folder of custom_nodes."""
    spec = importlib.util.spec_from_file_location("comfyui_wemmu", FOLDER / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(module.NODE_DISPLAY_NAME_MAPPINGS) == set(module.NODE_CLASS_MAPPINGS)
    return module.NODE_CLASS_MAPPINGS


def execute(node: type, **given: Any) -> tuple:
    """Run a node with the defaults of its inputs, and `given`."""
    inputs = node.INPUT_TYPES()
    unknown = set(given) - set(inputs["required"]) - set(inputs.get("optional", {}))
    assert not unknown
    for name, (kind, *options) in inputs["required"].items():
        if name not in given:
            given[name] = kind[0] if isinstance(kind, list) else options[0]["default"]
    outputs = getattr(node(), node.FUNCTION)(**given)
    assert len(outputs) == len(node.RETURN_TYPES)
    return outputs


def test_the_nodes_load_generate_and_edit_what_the_pipeline_does(
    nodes: dict[str, Any], exported: Path, pipe: WeMMUPipeline
):
    (loaded,) = execute(nodes["WeMMULoad"], directory=str(exported), device="cpu")
    made, sampled = nodes["WeMMUGenerate"], SIZE | {"pipeline": loaded, "seed": 3}
    (images,) = execute(made, prompt="a red circle", count=2, **sampled)
    assert (images.shape, images.dtype) == ((2, 32, 32, 3), torch.float32)
    size = {"height": 32, "width": 32, "num_inference_steps": 2, "seed": 3, "output_type": "np"}
    expected = pipe("a red circle", num_images_per_prompt=2, **size).images
    np.testing.assert_allclose(images.numpy(), expected, atol=1e-5)
    # A batch is edited image by image; the second image is combined with each.
    batch = (
        torch.stack([torch.from_numpy(np.array(noise_image(n).convert("RGB").resize((32, 32)))) for n in range(2)])
        / 255
    )
    (edited,) = execute(nodes["WeMMUEdit"], image=batch, prompt="make it red", **sampled)
    tensors = list(batch.movedim(-1, 1))
    expected = pipe(["make it red"] * 2, image=tensors, **size).images
    np.testing.assert_allclose(edited.numpy(), expected, atol=1e-5)
    (both,) = execute(nodes["WeMMUEdit"], image=batch, image_2=batch[1:], prompt="make it red", **sampled)
    expected = pipe(["make it red"] * 2, image=[[one, tensors[1]] for one in tensors], **size).images
    np.testing.assert_allclose(both.numpy(), expected, atol=1e-5)
    assert not np.allclose(both.numpy(), edited.numpy(), atol=1e-3)


def test_a_folder_that_is_no_export_is_named_by_the_node(nodes: dict[str, Any], tmp_path: Path):
    """Not looked for on the hub."""
    with pytest.raises(BackboneError, match=r"is not an export \(it has no model_index\.json\); `wemmu export"):
        execute(nodes["WeMMULoad"], directory=str(tmp_path))
