"""Published backbones by name: their config.json, for machines that do not have them.

Only what shapes follow from. tests/published counts the parameters of the real classes that they describe.
"""

import json
from pathlib import Path
from typing import Any


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    inner = {key: _merged(base.get(key, {}), value) for key, value in changes.items() if isinstance(value, dict)}
    return {**base, **changes, **inner}


def _load() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    file = Path(__file__).with_suffix(".json")
    for name, config in json.loads(file.read_text(encoding="utf-8")).items():
        # `like`: an entry above with the same fields, except those given here.
        found[name] = _merged(found.get(config.pop("like", ""), {}), config)
    return found


# The end of a hub's id, for a model in a pipeline with its folder there -> the content of config.json.
CONFIGS = _load()


def packaged(directory: Path) -> dict[str, Any] | None:
    """Return the published config.json for a directory of that name; None for others."""
    return CONFIGS.get(directory.name) or CONFIGS.get(f"{directory.parent.name}/{directory.name}")
