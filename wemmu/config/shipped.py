"""What comes with every installation: tools, job scripts, example configs, the miniature's backbones and weights."""

from collections.abc import Iterator
from pathlib import Path

# They lie beside the packages in a checkout, and inside the launcher after an installation (setup.py).
_INSTALLED = Path(__file__).resolve().parents[2] / "launcher" / "home"
HOME = _INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parents[1]
# How the names of the miniature's files begin in a config.
ASSETS = "assets/"


def config_file(path: Path) -> Path:
    """Return `path` or, if it is not there, the shipped config that it names, with or without `configs/` in front."""
    named = [HOME / path, HOME / "configs" / path] if not path.exists() else []
    return next((file for file in named if file.is_file()), path)


def configs() -> Iterator[tuple[str, Path, str]]:
    """Yield name, file and first comment of each shipped config."""
    for file in sorted((HOME / "configs").glob("*/*.yaml")):
        comment = []
        for line in file.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            comment.append(line.removeprefix("#").strip())
        yield str(file.relative_to(HOME / "configs")), file, " ".join(comment)
