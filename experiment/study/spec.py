"""What a study compares: curves of arms over budgets or other values of a recipe."""

import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from m2mkd.errors import RecipeError
from m2mkd.experiment.arms import PRESETS
from m2mkd.experiment.recipe import Engine, PhaseKind, Recipe, Resources
from m2mkd.experiment.recipe_file import EMBEDDED, explain, load_recipe, read_mapping
from m2mkd.experiment.section import FolderName, Section


class CurveSpec(Section):
    """
    One curve: an arm, and the values of the recipe that its points have.

    Args:
        arm (`str` or `dict`): A preset, or the words of an arm as in a recipe.
        set (`dict`): Values by dotted key that all its points have.
        points (`list[dict]`): Values by dotted key of each point.
        grid (`dict[str, list]`): Values of each key; every combination is a point.
    """

    arm: str | dict[str, Any]
    set: dict[str, Any] = Field(default_factory=dict)
    points: list[dict[str, Any]] = Field(default_factory=list)
    grid: dict[str, list[Any]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_form(self) -> "CurveSpec":
        if bool(self.points) == bool(self.grid):
            raise ValueError(
                "give either `points` (a list of values by key) or `grid` (a list of values for each key)"
            )
        return self

    def all_points(self) -> list[dict[str, Any]]:
        """The values of each point, those that all points have included."""
        combinations = itertools.product(*self.grid.values())
        points = self.points or [dict(zip(self.grid, values, strict=True)) for values in combinations]
        return [{**self.set, **point} for point in points]


class StudySpec(Section):
    """
    A study.

    Args:
        name (`str`): Name in the report.
        output_dir (`str`): Folder of the study; each point is a run in `runs/`.
        recipe (`str`): The recipe that all runs extend: a path, relative to the study's file, or `"default"`.
        seeds (`list[int]`): Seeds of each point; meta model and teacher are those of the first.
        baseline (`str`, *optional*): The curve that the others are compared with. `None`: the first.
        engine (`str`, *optional*): Where phases run, as in a recipe. `None`: the recipe's.
        resources (`dict`, *optional*): For Ray, as in a recipe. `None`: the recipe's.
        set (`dict`): Values by dotted key that differ from the recipe in all runs.
        curves (`dict[str, CurveSpec]`): The curves by name.
    """

    name: str
    output_dir: str
    recipe: str = "default"
    seeds: list[int] = Field(min_length=1)
    baseline: str | None = None
    engine: Engine | None = None
    resources: dict[PhaseKind, Resources] | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    curves: dict[FolderName, CurveSpec] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> "StudySpec":
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"`seeds` {self.seeds} must all be different")
        if self.baseline is not None and self.baseline not in self.curves:
            raise ValueError(f"`baseline` is {self.baseline!r}, but the curves are {', '.join(self.curves)}")
        return self

    @property
    def reference(self) -> str:
        """Name of the curve that the others are compared with."""
        return self.baseline or next(iter(self.curves))


@dataclass(frozen=True)
class Point:
    """
    One point of a curve: a run with one arm.

    Args:
        curve (`str`): Name of the curve, and of the arm.
        values (`dict`): The recipe's values by dotted key that are particular to it.
        recipe (`Recipe`)
    """

    curve: str
    values: dict[str, Any]
    recipe: Recipe

    @property
    def name(self) -> str:
        """Name of its run."""
        return Path(self.recipe.output_dir).name


def load_study(path: str | Path, overrides: dict[str, Any] | None = None) -> tuple[StudySpec, list[Point]]:
    """
    Read a study and the recipes of its points.

    Args:
        path (`str` or `Path`): A YAML file.
        overrides (`dict`, *optional*): Values of the study's own keys that replace those of the file.

    Raises:
        `RecipeError`: the file is not a study, or a point is not a valid recipe.
    """
    path = Path(path)
    try:
        spec = StudySpec.model_validate({**read_mapping(path), **(overrides or {})})
    except ValidationError as error:
        problems = [explain(problem) for problem in error.errors()]
        raise RecipeError("\n".join([f"{path} is not a valid study:", *problems])) from error
    base = EMBEDDED if spec.recipe == "default" else path.parent / spec.recipe
    points = [
        _point(spec, base, name, curve, values) for name, curve in spec.curves.items() for values in curve.all_points()
    ]
    names = [point.name for point in points]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(f"{path}: the points {', '.join(repeated)} are given twice.")
    return spec, points


def _point(spec: StudySpec, base: Any, name: str, curve: CurveSpec, values: dict[str, Any]) -> Point:
    identity = json.dumps([curve.arm, values], sort_keys=True, default=str)
    folder = f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    arm = [curve.arm] if isinstance(curve.arm, str) and curve.arm == name else [{name: _words(curve.arm)}]
    own = {
        "name": f"{spec.name}: {name}",
        "output_dir": str(Path(spec.output_dir) / "runs" / folder),
        "seed": spec.seeds[0],
        "repeat_seeds": spec.seeds[1:],
        "arms": arm,
        "equal_compute": False,
        **spec.model_dump(include={"engine", "resources"}, exclude_none=True),
    }
    try:
        return Point(name, values, load_recipe(base, {**spec.set, **values, **own}))
    except RecipeError as error:
        raise RecipeError(f"The point {values} of the curve {name!r} is not valid. {error}") from error


def _words(arm: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(arm, dict):
        return arm
    if arm not in PRESETS:
        raise RecipeError(f"{arm!r} is not a preset ({', '.join(PRESETS)}); give the words of the arm.")
    return PRESETS[arm].model_dump(exclude_defaults=True)
