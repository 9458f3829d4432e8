"""Recipes: what a run trains, on which data, for how long. YAML in, checked objects out."""

import copy
import itertools
import re
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from m2mkd.data.config import DataConfig
from m2mkd.experiment.arms import DEFAULT_ARMS, PRESETS, Arm, ArmSpec, named_specs, resolve
from m2mkd.experiment.section import Section, Training, rule_of


class RecipeError(ValueError):
    """A recipe, or a value given on the command line, is wrong; the message names the key."""


# What a value leaves no place for: (key, value or `None` for any, keys of the extended recipe that are dropped).
_INSTEAD_OF: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("meta.init", "from_teacher", ("meta.model", "teacher.incubation")),
    ("meta.model", None, ("meta.init",)),
    ("teacher.pretrained", None, ("teacher.model", "teacher.incubation")),
    ("teacher.model", None, ("teacher.pretrained",)),
)


class NetworkSpec(Section):
    """
    A network to build.

    Args:
        model_type (`str`): As in transformers: `"vit"`, `"deit"`, `"dinov2"`, `"nac"`, `"vmoe"`.
        preset (`str`, *optional*): A size of `VMoEConfig.from_preset` or `NACConfig.from_preset`.
        config (`dict`): Fields of the model's configuration. Image size and labels come from the data.
    """

    model_type: Literal["vit", "deit", "dinov2", "nac", "vmoe"]
    preset: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)


class MetaSpec(Section):
    """
    The meta model [PT].

    Args:
        init (`str`): `"random"`: `model` is trained by the labels, and the teacher can be incubated inside it.
            `"from_teacher"`: made of the teacher, whose stage boundaries its layers learn; any pretrained ViT will do.
        model (`NetworkSpec`, *optional*): What to train; `from_teacher` has the teacher's architecture.
        depths (`list[int]`, *optional*): Layers of each stage. `None`: one.
        data (`str`): Name of the training set; `from_teacher` does not read its labels.
        training (`dict`): Training arguments.
    """

    init: Literal["random", "from_teacher"] = "random"
    model: NetworkSpec | None = None
    depths: list[int] | None = None
    data: str
    training: Training = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_source(self) -> "MetaSpec":
        if (self.init == "random") == (self.model is None):
            raise ValueError(
                "give `model` (what to train), or `init: from_teacher` (the teacher's architecture), and not both"
            )
        return self


class TeacherSpec(Section):
    """
    The teacher: incubated inside the meta model and fine-tuned [MT + FT], or a published one. With
    `meta.init: from_teacher` there is no meta model to incubate in yet: a `model` is trained by `finetuning` alone.

    Args:
        pretrained (`str`, *optional*): Hub id or folder of a trained classifier; beside it only `depths` is read.
        model (`NetworkSpec`, *optional*): What to incubate.
        depths (`list[int]`): Layers of each stage.
        data (`str`, *optional*): Name of the training set.
        incubation, finetuning (`dict`): Training arguments of the two steps.
    """

    pretrained: str | None = None
    model: NetworkSpec | None = None
    depths: list[int]
    data: str | None = None
    incubation: Training = Field(default_factory=dict)
    finetuning: Training = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_source(self) -> "TeacherSpec":
        if (self.pretrained is None) == (self.model is None):
            raise ValueError("give `pretrained` (a Hub id or folder) or `model` (to incubate one), and not both")
        if self.model is not None and self.data is None:
            raise ValueError("`data` is missing: the set that the teacher is trained on")
        return self


class StudentSpec(Section):
    """The student and the layers of each of its stages."""

    model: NetworkSpec
    depths: list[int]


class DistillSpec(Section):
    """The distillation of the pairs [m2mKD]; `pairs` are those that this process trains, counted from 0."""

    _has_teacher = True
    data: str
    pairs: list[int] | Literal["all"] = "all"
    training: Training = Field(default_factory=dict)


class FinetuneSpec(Section):
    """The end-to-end phase [FT / E2E], the same for every arm; `keep_stitches` concerns the distilled student."""

    data: str
    keep_stitches: bool = False
    training: Training = Field(default_factory=dict)


class KDSpec(Section):
    """Ordinary distillation from the whole teacher: what differs from the end-to-end phase, e.g. `alpha`."""

    _has_teacher = True
    training: Training = Field(default_factory=dict)


class EvaluationSpec(Section):
    """Names of the test sets; `ood` is another distribution of the same classes."""

    iid: str
    ood: str | None = None


class Recipe(Section):
    """
    A whole experiment.

    Args:
        name (`str`): What the report calls it.
        output_dir (`str`): The run's folder.
        seed (`int`): Of weights, data order and augmentation.
        repeat_seeds (`list[int]`): Repeat distillation and arms with these seeds, sharing meta model and teacher.
        arms (`list` or `dict`): The arms to run, see `ArmSpec`: names of presets, or `{name: {init: …, supervision: …,
            data: …, training: …, budget: …}}`.
        equal_compute (`bool`): Also run each other arm with the FLOPs of the first arm that starts from modules: its
            distillation becomes extra epochs of theirs (`budget: {flops_of: …}`). An arm that takes more anyway is
            not run again; its result counts for both.
        processes (`int`, *optional*): How many phases to run at once on this machine, each in a process of its own
            with its share of the threads. `None`: on a CPU as many as there are arms and seeds, as far as there are
            threads; 1 with a GPU, or where several processes share each phase (torchrun).
        data (`dict[str, DataConfig]`): Data sets by name; the phases refer to them.
        training (`dict`): Training arguments of every phase; a phase's own come on top.
    """

    name: str
    output_dir: str
    seed: int = Field(default=0, ge=0, lt=2**31)
    repeat_seeds: list[int] = Field(default_factory=list)
    arms: dict[str, ArmSpec] = Field(
        default_factory=lambda: {name: PRESETS[name] for name in DEFAULT_ARMS}, min_length=1
    )
    equal_compute: bool = False
    processes: int | None = Field(default=None, ge=1)
    data: dict[str, DataConfig]
    training: Training = Field(default_factory=dict)
    meta: MetaSpec
    teacher: TeacherSpec
    student: StudentSpec
    distill: DistillSpec
    finetune: FinetuneSpec
    kd: KDSpec = Field(default_factory=KDSpec)
    evaluation: EvaluationSpec

    @field_validator("arms", mode="before")
    @classmethod
    def _named_arms(cls, arms: Any) -> Any:
        return named_specs(arms)

    @field_serializer("arms")
    def _short_arms(self, arms: dict[str, ArmSpec]) -> list[Any]:
        return [
            name if PRESETS.get(name) == spec else {name: spec.model_dump(mode="json", exclude_defaults=True)}
            for name, spec in arms.items()
        ]

    @property
    def all_arms(self) -> dict[str, Arm]:
        """The arms by name, those that `equal_compute` adds included."""
        return resolve(self.arms, self.equal_compute)

    def data_of(self, arm: Arm) -> str:
        """Name of the training set of an arm."""
        return arm.spec.data or self.finetune.data

    def _uses(self) -> dict[str, str]:
        """The names of data sets, by the key that names them."""
        names = {
            **{f"arms.{name}.data": spec.data for name, spec in self.arms.items()},
            "meta.data": self.meta.data,
            "teacher.data": self.teacher.data,
            "distill.data": self.distill.data,
            "finetune.data": self.finetune.data,
            "evaluation.iid": self.evaluation.iid,
            "evaluation.ood": self.evaluation.ood,
        }
        return {key: name for key, name in names.items() if name is not None}

    def used_data(self) -> dict[str, DataConfig]:
        """The data sets that the phases read or are tested on."""
        return {name: data for name, data in self.data.items() if name in self._uses().values()}

    def all_training(self) -> list[Training]:
        """The training arguments of every section."""
        arms = self.arms.values()
        sections = [section.training for section in (self, self.meta, self.distill, self.finetune, self.kd, *arms)]
        return [*sections, self.teacher.incubation, self.teacher.finetuning]

    @model_validator(mode="after")
    def _check_holdouts(self) -> "Recipe":
        """Both parts of a folder with a holdout must be in use, or images are lost silently."""
        used = {name: data for name, data in self.used_data().items() if data.holdout}
        for name, data in used.items():
            rest = {"train": "test", "test": "train"}.get(data.split)
            same = [other for other in used.values() if other.same_folder(data) and other.holdout == data.holdout]
            if rest is not None and rest not in [other.split for other in same]:
                raise ValueError(
                    f"`data.{name}` has `holdout: {data.holdout}` and is split {data.split!r} of {data.source!r}, but "
                    f"no other set of this recipe is split {rest!r} of that folder with the same `holdout`. For "
                    f"separate folders, set data.{name}.holdout to 0 and data.{name}.split to null, as "
                    "recipes/image_folders.yaml does for each set. For one folder, give both sets its path as `source`"
                )
        return self

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        for key, name in self._uses().items():
            if name not in self.data:
                raise ValueError(f"`{key}` is {name!r}, but `data` has only {sorted(self.data)}")
        num_pairs = len(self.student.depths)
        for key, depths in (("teacher.depths", self.teacher.depths), ("meta.depths", self.meta.depths)):
            if depths is not None and len(depths) != num_pairs:
                raise ValueError(
                    f"`student.depths` {self.student.depths} makes {num_pairs} stages and `{key}` {depths} makes "
                    f"{len(depths)}; pair i takes stage i of each network"
                )
        if self.meta.init == "from_teacher" and self.teacher.incubation:
            raise ValueError(
                "`teacher.incubation` needs a meta model to incubate in, but `meta.init` is from_teacher; leave it "
                "out (`teacher.finetuning` trains the whole teacher), or train a `meta.model`"
            )
        if self.finetune.keep_stitches and self.student.model.model_type != "vmoe":
            raise ValueError(
                f"`finetune.keep_stitches` is for a vmoe; a {self.student.model.model_type} has no place for stitches"
            )
        resolve(self.arms, self.equal_compute)
        seeds = [self.seed, *self.repeat_seeds]
        if len(set(seeds)) != len(seeds):
            raise ValueError(f"`seed` {self.seed} and `repeat_seeds` {self.repeat_seeds} must all differ")
        return self


def load_recipe(path: str | Path | None = None, overrides: dict[str, Any] | None = None) -> Recipe:
    """
    Read a recipe. Its key `extends` names another recipe, relative to its own folder, whose values it takes over but
    for those that it gives itself: sections are merged key by key, anything else is replaced. So is a network by one
    with another `model_type`, and what a value leaves no place for is dropped: `meta.model` by `meta.init:
    from_teacher`, `teacher.model` by `teacher.pretrained`, and the other way round.

    Args:
        path (`str` or `Path`, *optional*): A YAML file. `None`: the embedded default.
        overrides (`dict[str, Any]`, *optional*): Values by dotted key, e.g.
            `{"finetune.training.num_train_epochs": 3}`.

    Raises:
        `RecipeError`: a file that is no YAML mapping, an unknown key, a wrong type or value.
    """
    source = Path(path) if path is not None else resources.files("m2mkd.trainer") / "default.yaml"
    content = _read(source, [])
    given: dict[str, Any] = {}
    for key, value in (overrides or {}).items():
        _set(given, key, value)
    content = _without_replaced(content, given)
    for key, value in (overrides or {}).items():
        _set(content, key, value)
    return parse_recipe(content, str(source))


def list_recipes() -> dict[str, str]:
    """The first sentence of the embedded recipe and of those in the folder `recipes` here, by name or path."""
    embedded = {"(none given)": resources.files("m2mkd.trainer") / "default.yaml"}
    recipes = {**embedded, **{str(path): path for path in _recipes_here()}}
    return {name: _first_sentence(source.read_text(encoding="utf-8")) for name, source in recipes.items()}


def _recipes_here() -> list[Path]:
    return sorted(Path("recipes").glob("*.yaml"))


def _first_sentence(text: str) -> str:
    """Of the comment that a file starts with."""
    lines = itertools.takewhile(lambda line: line.startswith("# "), text.splitlines())
    return " ".join(line.removeprefix("# ") for line in lines).partition(". ")[0].removesuffix(".") + "."


def _read(source: Any, extended: list[str]) -> dict[str, Any]:
    """The content of a recipe, with what it extends; `extended` are those that extend it."""
    if not source.is_file():
        here = ", ".join(str(path) for path in _recipes_here())
        raise RecipeError(
            f"There is no recipe {source}. "
            + (f"There are: {here}." if here else "The repository of m2mkd has some in its folder recipes/.")
        )
    try:
        content = yaml.load(source.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{source} cannot be read as YAML: {_yaml_problem(error)}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{source} holds no mapping of keys to values.")
    base = content.pop("extends", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise RecipeError(f"{source}: `extends` is {base!r}; give the path of one recipe.")
    if str(source) in extended:
        raise RecipeError(f"{source} extends itself, by way of {extended}.")
    inherited = _read(source.parent / base, [*extended, str(source)])
    return _merged(_without_replaced(inherited, content), content)


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merged(base[key], value) if both else value
    return merged


def _without_replaced(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The content of a recipe without what `own`, which comes on top of it, leaves no place for."""
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
    """Check the content of a recipe; `source` is what the message of a `RecipeError` calls it."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        problems = [_explain(problem) for problem in error.errors()]
        raise RecipeError("\n".join([f"{source} is no valid recipe:", *problems])) from error


def parse_value(text: str) -> Any:
    """A value from the command line, as YAML reads it: `3`, `1e-3`, `true`, `[0, 1]`, `text`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"The value {text!r} cannot be read as YAML. Close its brackets and quotes, or, if it is text, put it in "
            f"quotes of its own: \"'{text}'\"."
        ) from error


def _yaml_problem(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """Where a file is no YAML, why, and what to do."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f"{error}. Save it as text in UTF-8."
    mark = error.problem_mark
    advice = (
        "Keep one of them"
        if isinstance(error, yaml.constructor.ConstructorError)
        else "Check the colons, quotes and brackets of this line and the one before, and indent with spaces"
    )
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}. {advice}."


def _explain(problem: Any) -> str:
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
            raise RecipeError(f"{key}: `{parent}` is a value, not a section, so nothing can be set inside it.")
    node[last] = value


class _Loader(yaml.SafeLoader):
    """
    Safe YAML that reads `1e-3` as a number and `no`, `off`, `yes` and `on` as text, as YAML 1.2 does, and refuses a
    key given twice.
    """

    # no list of another loader's is changed
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # before `<<` is resolved: a merged key may well be given again
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
