"""The arguments that follow a recipe on the command line: `--key.sub value`."""

from typing import Any


def recipe_and_options(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The recipe, if one is given first, and what follows it."""
    # not a parameter of the command: click would take the value of the first override for it
    has_recipe = bool(arguments) and not arguments[0].startswith("--")
    return (arguments[0], arguments[1:]) if has_recipe else (None, arguments)


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """`--key value` and `--key=value` as values by dotted key."""
    from m2mkd.errors import RecipeError
    from m2mkd.experiment.recipe_file import parse_value

    overrides: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            raise RecipeError(f"{name!r} is not an option. Values of the recipe are given as --key.sub value.")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise RecipeError(f"{name} has no value. Values of the recipe are given as --key.sub value.")
            value = rest.pop(0)
        overrides[name.removeprefix("--")] = parse_value(value)
    return overrides
