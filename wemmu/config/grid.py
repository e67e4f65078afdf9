"""How many tokens of the VLM a picture has: a rule that planning, training and sampling share."""


def token_grid(height_px: int, width_px: int, token_px: int) -> tuple[int, int]:
    """VLM tokens of a picture, (rows, columns): each side rounded to whole tokens, as Qwen's processor rounds it.

    Of 28 px: 512 px -> 18, 768 px -> 27, 1024 px -> 37; halves go to the even number. The processor also keeps the
    number of pixels between two bounds (56 x 56 and 3584 x 3584 px for the published Qwen2.5-VL); these are not
    followed, for the resolution of a stage is its own choice.

    Raises:
        ValueError: if the picture is smaller than one token.
    """
    if min(height_px, width_px) < token_px:
        raise ValueError(f"a picture of {height_px} x {width_px} px is smaller than one VLM token of {token_px} px")
    return round(height_px / token_px), round(width_px / token_px)
