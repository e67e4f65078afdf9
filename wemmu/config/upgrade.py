"""Converts configs of earlier versions to today's fields."""

from collections.abc import Mapping
from typing import Any

# Field of earlier versions -> where it stands now, and how that is written.
MOVED = {
    "bridge": ("recipe.bridge", "`recipe: {kind: wemmu, bridge: {...}}`"),
    "reconstruction": ("recipe", "its fields into `recipe: {kind: ross, ...}`"),
}
# Field of earlier versions -> its name now, dotted, beside the same others; `*` is any stage.
RENAMED = {
    "memory.cached_pictures": "cached_images",
    "data.prepare.pictures": "images",
    "stages.*.next_rung": "next_resolution",
    "stage.next_rung": "next_resolution",
    "stage.ladder": "resolutions",
    **{
        f"{stage}.optimizer.{module}_lr": f"module_lr.{module}"
        for stage in ("stages.*", "stage") for module in ("dit", "head")
    },
}  # fmt: skip


def moved(name: str) -> str:
    """Return the current name of a dotted field."""
    first, _, rest = name.partition(".")
    if rest and first in MOVED:
        return f"{MOVED[first][0]}.{rest}"
    parts = name.split(".")
    for old, new in RENAMED.items():
        pattern = old.split(".")
        if len(parts) >= len(pattern) and all(p in ("*", part) for p, part in zip(pattern, parts, strict=False)):
            parts[len(pattern) - 1 : len(pattern)] = new.split(".")
    return ".".join(parts)


def renamed(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the config with the fields of `RENAMED` under their current names, and the renamed fields: old -> new."""
    found = {}
    for old, new in RENAMED.items():
        before, tree = tree, _renamed(tree, old.split("."), new, "")
        if tree != before:
            found[old] = new
    return tree, found


def _renamed(value: Any, path: list[str], new: str, name: str) -> Any:
    first, *rest = path
    if first == "*":
        listed = isinstance(value, list | tuple)
        return [_renamed(one, rest, new, f"{name}{i}.") for i, one in enumerate(value)] if listed else value
    if not isinstance(value, Mapping) or first not in value:
        return value
    if rest:
        return {**value, first: _renamed(value[first], rest, new, f"{name}{first}.")}
    others = {field: one for field, one in value.items() if field != first}
    group, _, inside = new.rpartition(".")
    if group and value[first] is None:
        return others
    return _merged(others, {group: {inside: value[first]}} if group else {new: value[first]}, name.removesuffix("."))


def upgraded(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a curriculum or of one stage in the current form.

    Earlier versions chose the recipe by the objective of the stages, and had the fields of all recipes side by side:
    `bridge` of WeMMU, `reconstruction` of ROSS. An override may still name these.
    """
    tree = _offloaded(renamed(tree)[0])
    rest = {name: value for name, value in tree.items() if name not in MOVED}
    recipe: Any = tree.get("recipe") or {}
    if not isinstance(recipe, dict):
        return rest
    recipe = {"kind": recipe_kind(tree)} | recipe
    earlier = {
        "ross": tree.get("reconstruction"),
        "wemmu": {"bridge": tree["bridge"] or {}} if "bridge" in tree else {},
    }
    return rest | {"recipe": _merged(recipe, earlier.get(recipe["kind"]) or {}, "recipe")}


def _offloaded(tree: dict[str, Any]) -> dict[str, Any]:
    """UAE's own field, `recipe.generator.offload`, as what every recipe has: `memory.offload`."""
    recipe: Any = tree.get("recipe")
    memory = tree.get("memory") or {}
    generator = recipe.get("generator") if isinstance(recipe, Mapping) else None
    if not isinstance(generator, Mapping) or "offload" not in generator:
        return tree
    kept = {name: value for name, value in generator.items() if name != "offload"}
    tree = {**tree, "recipe": {**recipe, "generator": kept}}
    if generator["offload"] and isinstance(memory, Mapping):
        tree["memory"] = {"offload": ["generator"], **memory}
    return tree


def upgraded_file(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the content of one file in the current form, and its old fields -> how to write them."""
    moved = {name: written for name, (_, written) in MOVED.items() if name in tree}
    tree, found = renamed(tree)
    # `module_lr.dit` is written `module_lr: {dit: ...}`.
    notes = moved | {old: f"`{new.replace('.', ': {')}{': ...}' * ('.' in new)}`" for old, new in found.items()}
    without = _offloaded(tree)
    if without != tree:
        notes["recipe.generator.offload"] = "`memory: {offload: [generator]}`"
    return upgraded(tree) if moved else without, notes


def _merged(now: dict[str, Any], old: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Merge both; raise an error if they contradict each other."""
    found = dict(now)
    for field, value in old.items():
        here = f"{name}.{field}"
        if isinstance(value, dict) and isinstance(found.setdefault(field, {}), dict):
            found[field] = _merged(found[field], value, here)
        elif found.setdefault(field, value) != value:
            raise ValueError(
                f"{here} is {found[field]} and, under its name of earlier versions, {value}; remove the old name"
            )
    return found


def recipe_kind(tree: dict[str, Any]) -> str:
    """Return the recipe of an old config by its objectives, or by its fields if it has no stages."""
    listed: Any = tree.get("stages")
    stages = [*(listed if isinstance(listed, list) else ()), tree.get("stage")]
    stages = [stage for stage in stages if isinstance(stage, dict)]
    if not stages:
        return "ross" if "reconstruction" in tree and "bridge" not in tree else "wemmu"
    kinds = [stage["objective"].get("kind") for stage in stages if isinstance(stage.get("objective"), dict)]
    return "ross" if "reconstructive" in kinds else "wemmu"


def upgraded_settings(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded fields of a config, dotted name -> value, under current names.

    now: those of the config of today. Earlier versions recorded the fields of all recipes.
    """
    rates = {f"optimizer.{module}_lr": module for module in ("dit", "head")}
    if rates.keys() & was.keys():
        given = {f"optimizer.module_lr.{rates[field]}": was[field] for field in rates if was.get(field) is not None}
        was = {field: value for field, value in was.items() if field not in rates}
        was |= given or {"optimizer.module_lr": {}}
    if not was or any(field.startswith("recipe.") for field in was):
        return dict(was)
    own = {"wemmu": "bridge.", "ross": "reconstruction."}.get(now["recipe.kind"])
    if own is None:  # a recipe that they did not have
        return dict(was)
    rest = {field: value for field, value in was.items() if not field.startswith(("bridge.", "reconstruction."))}
    recipe = {field: value for field, value in was.items() if field.startswith(own)}
    if not recipe:
        return rest
    renamed = {f"recipe.{field if own == 'bridge.' else field.removeprefix(own)}": v for field, v in recipe.items()}
    return rest | {"recipe.kind": now["recipe.kind"]} | renamed
