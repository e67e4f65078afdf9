"""The config.json files of the published backbones, for plans on machines that do not have them.

Only what shapes and arithmetic follow from; tests/models/test_real_sizes.py builds the real classes of them and counts.
"""

from pathlib import Path

_HERE = Path(__file__).parent


def packaged(name: str) -> Path | None:
    """The directory with the config.json files of the published backbone `name`; None for others."""
    return next((folder for folder in _HERE.iterdir() if folder.is_dir() and folder.name == name), None)
