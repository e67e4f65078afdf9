"""Numbers as people read them."""


def human(value: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: 7_509_000_000, "B" -> "7.51 GB"."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    while abs(value) >= 999.5 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{value:.3g} {prefixes[0]}{unit}".rstrip()


def duration(seconds: float) -> str:
    """As a clock says it: 3:07, or 1:00:05 from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
