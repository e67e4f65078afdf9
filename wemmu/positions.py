"""M-RoPE positions: the (temporal, height, width) index of every token, as Qwen2.5-VL counts them.

Text advances all three axes together. An image of h x w tokens that starts at position p holds t = p, rows p..p+h-1 and
columns p..p+w-1; what follows starts one after the largest of them. Queries that stand for an image use the same form.
`tests/test_positions.py` compares with `Qwen2_5_VLModel.get_rope_index`.
"""

import torch
from torch import Tensor


def token_grid(height_px: int, width_px: int, token_px: int) -> tuple[int, int]:
    """Return the VLM tokens of an image, (rows, columns): each side rounded to whole tokens, as by Qwen's processor.

    With 28 px per token: 512 px -> 18, 768 px -> 27, 1024 px -> 37; halves round to even. The processor also limits the
    number of pixels (56 x 56 to 3584 x 3584 px for the published Qwen2.5-VL). This function does not, because a stage
    chooses its resolution.

    Raises:
        ValueError: if the image is smaller than one token.
    """
    if min(height_px, width_px) < token_px:
        raise ValueError(f"an image of {height_px} x {width_px} px is smaller than one VLM token of {token_px} px")
    return round(height_px / token_px), round(width_px / token_px)


def image_grid_positions(start: Tensor | int, height: int, width: int) -> Tensor:
    """Return positions of an image of `height` x `width` tokens in row-major order.

    `start` is an int, giving [3, h * w], or a tensor [B], giving [3, B, h * w].
    """
    # Made where it is used: of a copy from the host, the host would wait for all that its GPU has still to do.
    device = torch.device("cpu") if isinstance(start, int) else start.device
    rows, columns = (torch.arange(n, device=device) for n in (height, width))
    rows, columns = rows[:, None].expand(-1, width).flatten(), columns.repeat(height)
    grid = torch.stack([torch.zeros_like(rows), rows, columns])
    return grid + start if isinstance(start, int) else grid[:, None, :] + start[None, :, None]


def prompt_positions(token_ids: list[int], image_token_id: int, grids: list[tuple[int, int]]) -> tuple[Tensor, int]:
    """Compute positions [3, L] of a prompt whose k-th run of image tokens has `grids[k]` = (height, width) tokens.

    Returns the positions and the position at which the next token would stand.

    Raises:
        ValueError: if the runs of image tokens are not those that `grids` describes.
    """
    pieces: list[Tensor] = []
    start, i, image = 0, 0, 0
    while i < len(token_ids):
        if token_ids[i] == image_token_id:
            if image == len(grids):
                raise ValueError(f"the prompt has more runs of image tokens than the {len(grids)} images given")
            height, width = grids[image]
            run = token_ids[i : i + height * width]
            if run != [image_token_id] * (height * width):
                raise ValueError(
                    f"image {image} needs {height} x {width} image tokens in one run, the prompt has fewer"
                )
            pieces.append(image_grid_positions(start, height, width))
            start, i, image = start + max(height, width), i + height * width, image + 1
        else:
            end = i
            while end < len(token_ids) and token_ids[end] != image_token_id:
                end += 1
            pieces.append(torch.arange(start, start + end - i).expand(3, -1))
            start, i = start + end - i, end
    if image != len(grids):
        raise ValueError(f"{len(grids)} images were given but the prompt holds {image}")
    return torch.cat(pieces, dim=1), start
