"""What comes with this package: recipes, and shapes, which are public models' config.json without weights."""

from __future__ import annotations

from pathlib import Path

from megatron_apo.config.base import RecipeError

RECIPES = Path(__file__).parents[1] / "recipes"
SHAPE = "shape:"  # before the name of a public model whose config.json is one of RECIPES/shapes


def shapes() -> list[str]:
    """Names of the public models whose config.json is here."""
    return sorted(path.stem for path in (RECIPES / "shapes").glob("*.json"))


def shape_name(folder: Path) -> str | None:
    """ "qwen3-8b" for shape:qwen3-8b, None for a folder."""
    return str(folder).removeprefix(SHAPE) if str(folder).startswith(SHAPE) else None


def model_config_file(folder: Path) -> Path:
    """The config.json of a Hugging Face folder or of a shape, whether it is there or not."""
    name = shape_name(folder)
    return folder / "config.json" if name is None else RECIPES / "shapes" / f"{name}.json"


def recipe_path(name: str) -> Path:
    """The file of a recipe of this package, e.g. "quickstart". Raises `RecipeError` naming those there are."""
    shipped = {path.stem: path for path in RECIPES.glob("*.yaml")}
    if name not in shipped:
        raise RecipeError([f"recipe: {name} is not a file nor one of the recipes here: {', '.join(sorted(shipped))}"])
    return shipped[name]
