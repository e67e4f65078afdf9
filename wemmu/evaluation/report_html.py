"""How the reports' pages are made: their templates, and numbers in words."""

from jinja2 import Environment, PackageLoader, StrictUndefined


def templates() -> Environment:
    """The templates, which refuse a value that nobody gave them."""
    loader = PackageLoader("wemmu.evaluation")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"duration": duration, "percent": percent, "size": size}
    return environment


def percent(share: float) -> str:
    """0.935 -> `93.5 %`; a narrow space keeps number and sign together."""
    return f"{100 * share:.1f}\u202f%"


def duration(seconds: float) -> str:
    """Seconds as `48 s`, `12 min 05 s` or `3 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: int) -> str:
    """Bytes as `1.2 MB`."""
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
