"""The number of VLM tokens of an image; planning, training and sampling share this rule."""


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
