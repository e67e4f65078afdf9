"""The recipes, and their objectives. A further recipe is a folder in wemmu/recipes, and its config in `RECIPES`."""

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from wemmu.config.objectives import Objective
from wemmu.config.recipe import RecipeConfig
from wemmu.recipes.ross.config import Ross
from wemmu.recipes.uae.config import UAE
from wemmu.recipes.wemmu.config import WeMMU

# A config that names no recipe means the first, and one that names no objective the first of that.
RECIPES: tuple[type[RecipeConfig], ...] = (WeMMU, Ross, UAE)

if TYPE_CHECKING:
    AnyRecipe = RecipeConfig
    AnyObjective = Objective
else:
    _OBJECTIVES = tuple(dict.fromkeys(objective for recipe in RECIPES for objective in recipe.objectives))
    AnyRecipe = Annotated[Union[RECIPES], Field(discriminator="kind")]  # noqa: UP007
    AnyObjective = Annotated[Union[_OBJECTIVES], Field(discriminator="kind")]  # noqa: UP007
