"""Writes reference/recipe.md from the recipe's pydantic models and reference/cli.md from the command line."""

import inspect
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from transformers import TrainingArguments
from typer.cli import get_docs_for_click

from m2mkd.cli import app
from m2mkd.experiment.recipe import Recipe
from m2mkd.trainer.m2mkd_config import M2MKDConfig


FOLDER = Path(__file__).parent / "reference"
HEADER = "<!-- Written by docs/generate_reference.py; do not edit. -->\n\n"
TRAINING = """## Training arguments

Every `training`, `incubation` and `finetuning` takes the arguments of
[`transformers.TrainingArguments`](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments)
(apart from those that the run sets itself, such as `output_dir` and `seed`) and these:

"""


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """The texts of a docstring's `Args:`, by the name of the field."""
    entries = inspect.cleandoc(model.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    found = {}
    for entry in re.split(r"\n?^    (?=\w)", entries, flags=re.MULTILINE)[1:]:
        names, text = re.fullmatch(r"([\w, ]+?)(?: \(.*?\))?: (.*)", " ".join(entry.split())).groups()
        found |= dict.fromkeys(names.split(", "), text)
    return found


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The models in a type such as `dict[str, DataConfig]` or `MetaSpec | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in sections_in(part)]


def type_of(field: FieldInfo) -> str:
    text = str(field.annotation) if get_args(field.annotation) else getattr(field.annotation, "__name__", "")
    text = re.sub(r"\b(?:typing|m2mkd(?:\.\w+)*)\.", "", text).replace(" | ", " or ")
    return re.sub(r"Annotated\[(\w+), AfterValidator\([^]]*\)\]", r"\1", text)  # it is printed with an address


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        return "as below"
    if isinstance(value, dict) and any(isinstance(entry, BaseModel) for entry in value.values()):
        value = list(value)
    return "required" if value is PydanticUndefined else f"`{value}`"


def row(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |\n"


def table(model: type[BaseModel]) -> str:
    texts = meanings(model)
    rows = row("key", "type", "default", "meaning") + "|---|---|---|---|\n"
    for name, field in model.model_fields.items():
        links = ", ".join(f"[{inner.__name__}](#{inner.__name__.lower()})" for inner in sections_in(field.annotation))
        text = texts.get(name) or inspect.cleandoc(sections_in(field.annotation)[0].__doc__).partition("\n\n")[0]
        rows += row(
            f"`{name}`", f"`{type_of(field)}`", default_of(field), f"{text} {links and f'See {links}.'}".strip()
        )
    return rows


def recipe_reference() -> str:
    """One table a section, in the order in which a recipe names them."""
    models = [Recipe]
    for model in models:
        inner = [found for field in model.model_fields.values() for found in sections_in(field.annotation)]
        models += [found for found in dict.fromkeys(inner) if found not in models]
    text = f"{HEADER}# The keys of a recipe\n\n"
    for model in models:
        summary = inspect.cleandoc(model.__doc__ or "").partition("\n\nArgs:")[0]
        text += f"## {model.__name__}\n\n{summary}\n\n{table(model)}\n"
    inherited = {field.name for field in fields(TrainingArguments)}
    own = [field for field in fields(M2MKDConfig) if field.name not in inherited]
    text += TRAINING + row("argument", "default", "meaning") + "|---|---|---|\n"
    for field in own:
        default = field.default if field.default is not MISSING else field.default_factory()
        text += row(f"`{field.name}`", f"`{default}`", field.metadata["help"].replace("%%", "%"))
    return text


def cli_reference() -> str:
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="m2mkd")
    return HEADER + get_docs_for_click(obj=command, ctx=context, name="m2mkd", title="Commands")


PAGES = {"recipe.md": recipe_reference, "cli.md": cli_reference}

if __name__ == "__main__":
    for name, render in PAGES.items():
        (FOLDER / name).write_text(render().rstrip() + "\n", encoding="utf-8")
