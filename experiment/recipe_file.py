"""Reading of recipes: YAML in, checked objects out."""

import copy
import itertools
import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    BaseModel,
    ValidationError,
)

from m2mkd.errors import RecipeError
from m2mkd.experiment.recipe import Recipe
from m2mkd.experiment.section import rule_of


# Keys that a value replaces: (key, value or `None` for any, keys of the extended recipe that are dropped).
_INSTEAD_OF: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("meta.init", "from_teacher", ("meta.model", "teacher.incubation")),
    ("meta.model", None, ("meta.init",)),
    ("teacher.pretrained", None, ("teacher.model", "teacher.incubation")),
    ("teacher.model", None, ("teacher.pretrained",)),
)


# The recipe that runs if none is given; other recipes extend it as `default`.
EMBEDDED = resources.files("m2mkd.experiment") / "default.yaml"


def load_recipe(path: str | Path | None = None, overrides: dict[str, Any] | None = None) -> Recipe:
    """
    Read a recipe. Its key `extends` names another recipe, relative to its own folder, whose values it inherits except
    those that it gives itself: sections are merged key by key, anything else is replaced. A network with another
    `model_type` replaces the whole network. Values that exclude each other are dropped: `meta.init: from_teacher`
    drops `meta.model`, `teacher.pretrained` drops `teacher.model`, and the other way round.

    Args:
        path (`str` or `Path`, *optional*): A YAML file. `None`: the embedded default.
        overrides (`dict[str, Any]`, *optional*): Values by dotted key, e.g.
            `{"finetune.training.num_train_epochs": 3}`.

    Raises:
        `RecipeError`: a file is not a YAML mapping, a key is unknown, or a type or value is wrong.
    """
    source = Path(path) if path is not None else EMBEDDED
    content = _read(source, [])
    given: dict[str, Any] = {}
    for key, value in (overrides or {}).items():
        _set(given, key, value)
    content = _without_replaced(content, given)
    for key, value in (overrides or {}).items():
        _set(content, key, value)
    return parse_recipe(content, str(source))


def _read(source: Any, extended: list[str]) -> dict[str, Any]:
    """The content of a recipe, merged with the recipe that it extends; `extended` are the recipes that extend it."""
    if not source.is_file():
        here = ", ".join(str(path) for path in _recipes_here())
        raise RecipeError(
            f"There is no recipe {source}. "
            + (f"Available: {here}." if here else "The repository of m2mkd has some in its folder recipes/.")
        )
    content = read_mapping(source)
    base = content.pop("extends", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise RecipeError(f"{source}: `extends` is {base!r}; give the path of one recipe.")
    if str(source) in extended:
        raise RecipeError(f"{source} extends itself, through {extended}.")
    inherited = _read(EMBEDDED if base == "default" else source.parent / base, [*extended, str(source)])
    return _merged(_without_replaced(inherited, content), content)


def read_mapping(source: Any) -> dict[str, Any]:
    """The content of a YAML file. Raises `RecipeError` if it is not a mapping."""
    try:
        content = yaml.load(source.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise RecipeError(f"{source} cannot be read: {error.strerror}. Check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{source} cannot be read as YAML: {_yaml_problem(error)}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{source} is not a mapping of keys to values.")
    return content


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merged(base[key], value) if both else value
    return merged


def _without_replaced(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The content of a recipe without the keys that `own`, which overrides it, replaces."""
    base = copy.deepcopy(base)
    dropped = [
        key
        for decisive, value, keys in _INSTEAD_OF
        if (given := _get(own, decisive)) is not None and value in (None, given)
        for key in keys
    ]
    for section in ("meta", "teacher", "student"):
        before, after = (_get(content, f"{section}.model.model_type") for content in (base, own))
        if None not in (before, after) and before != after:
            dropped.append(f"{section}.model")
    for key in dropped:
        *parents, last = key.split(".")
        section = _get(base, ".".join(parents))
        if isinstance(section, dict):
            section.pop(last, None)
    return base


def _get(content: Any, key: str) -> Any:
    """The value under a dotted key; `None` if there is none."""
    for part in key.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return content


def parse_recipe(content: dict[str, Any], source: str) -> Recipe:
    """Check the content of a recipe; `source` is its name in the message of a `RecipeError`."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        problems = [explain(problem) for problem in error.errors()]
        raise RecipeError("\n".join([f"{source} is not a valid recipe:", *problems])) from error


def parse_value(text: str) -> Any:
    """Parse a value from the command line as YAML: `3`, `1e-3`, `true`, `[0, 1]`, `text`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"The value {text!r} cannot be read as YAML. Close its brackets and quotes, or, if it is text, quote it: "
            f"\"'{text}'\"."
        ) from error


def _yaml_problem(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """Explain where and why a file is not valid YAML, and what to do."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f"{error}. Save it as text in UTF-8."
    mark = error.problem_mark
    advice = (
        "Keep one of them"
        if isinstance(error, yaml.constructor.ConstructorError)
        else "Check the colons, quotes and brackets of this line and the one before, and indent with spaces"
    )
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}. {advice}."


def explain(problem: Any) -> str:
    """One of pydantic's problems as a line: the key, what is wrong, and the value."""
    key = ".".join(str(part) for part in problem["loc"]) or "the recipe"
    if problem["type"] == "extra_forbidden":
        return f"  {key}: there is no such key"
    if problem["type"] == "missing":
        return f"  {key}: this key is missing"
    given = "" if isinstance(problem["input"], dict | BaseModel) else f" (given: {problem['input']!r})"
    return f"  {key}: {rule_of(problem)}{given}"


def _set(content: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node = content
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise RecipeError(f"{key}: `{parent}` is a value, not a section, so no key inside it can be set.")
    node[last] = value


class _Loader(yaml.SafeLoader):
    """
    Safe YAML that reads `1e-3` as a number and `no`, `off`, `yes` and `on` as text, as YAML 1.2 does, and refuses a
    key given twice.
    """

    # a new dictionary: the lists of other loaders stay unchanged
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # before `<<` is resolved: a merged key may be given again
        given: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in given:
                raise yaml.constructor.ConstructorError(None, None, f"`{key.value}` is given twice", key.start_mark)
            given.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def list_recipes() -> dict[str, str]:
    """The first sentence of the embedded recipe and of those in the folder `recipes` here, by name or path."""
    embedded = {"(none given)": EMBEDDED}
    recipes = {**embedded, **{str(path): path for path in _recipes_here()}}
    return {name: _first_sentence(source.read_text(encoding="utf-8")) for name, source in recipes.items()}


def _recipes_here() -> list[Path]:
    return sorted(Path("recipes").glob("*.yaml"))


def _first_sentence(text: str) -> str:
    """Of the comment that a file starts with."""
    lines = itertools.takewhile(lambda line: line.startswith("# "), text.splitlines())
    return " ".join(line.removeprefix("# ") for line in lines).partition(". ")[0].removesuffix(".") + "."
