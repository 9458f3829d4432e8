"""
Arms: ways to get a trained student. Four words define an arm: where the student's weights come from, what its
end-to-end phase learns from, on which data, and with which arguments and budget. Everything that the package does with
an arm follows from these words; only this file knows the names of the presets.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field, model_validator

from m2mkd.experiment.section import Section, Training, check_training


class Budget(Section):
    """
    How long an arm trains.

    Args:
        flops_of (`str`): Name of an arm; as many epochs as its FLOPs, including its distillation, allow.
    """

    flops_of: str


class ArmSpec(Section):
    """
    The four words of an arm.

    Args:
        init (`str`): Where the student's weights come from: `"random"`, `"modules"` (the distilled pairs), or
            `"upcycled"` (every expert is a copy of a dense network's MLP, see the recipe's `upcycle`).
        supervision (`str`): What the end-to-end phase learns from: `"labels"`, or `"teacher"` (ordinary distillation,
            with the additional arguments of `kd.training`).
        data (`str`, *optional*): Name of the training set. `None`: that of `finetune`.
        training (`dict`): Training arguments that override those of `finetune`.
        budget (`Budget`, *optional*): `None`: the epochs of the training arguments.
    """

    init: Literal["random", "modules", "upcycled"] = "random"
    supervision: Literal["labels", "teacher"] = "labels"
    data: str | None = None
    training: Training = Field(default_factory=dict)
    budget: Budget | None = None

    @classmethod
    def _check_training(cls, training: Training) -> Training:
        # which arguments fit depends on the supervision, which is not known yet
        return training

    @model_validator(mode="after")
    def _training_fits(self) -> "ArmSpec":
        check_training(self.training, self.supervision == "teacher")
        if self.budget is not None and {"num_train_epochs", "max_steps"} & self.training.keys():
            raise ValueError("give either `budget` or a length in `training` (num_train_epochs, max_steps)")
        return self


# A name in a recipe's list of arms, or the base of one that is spelled out there.
PRESETS = {
    "e2e": ArmSpec(),
    "kd": ArmSpec(supervision="teacher"),
    "m2mkd": ArmSpec(init="modules"),
    "m2mkd_kd": ArmSpec(init="modules", supervision="teacher"),
    "upcycle": ArmSpec(init="upcycled"),
    "upcycle_kd": ArmSpec(init="upcycled", supervision="teacher"),
}
DEFAULT_ARMS = ("e2e", "kd", "m2mkd")
# The arm whose compute the baselines of old results have.
_COMPARED = "m2mkd"
# Okabe and Ito's colors, which color-blind readers can distinguish. A recipe's own arms take the further ones in turn.
_COLORS = {
    "e2e": "#0072B2",
    "kd": "#D55E00",
    "m2mkd": "#009E73",
    "m2mkd_kd": "#CC79A7",
    "upcycle": "#56B4E9",
    "upcycle_kd": "#E69F00",
}
_FURTHER_COLORS = ("#332288", "#882255", "#999933", "#666666", "#AA4499")
_EQUAL_COMPUTE = "_equal_compute"
_INIT = {
    "random": ("It is a baseline: trained end to end", "end-to-end training"),
    "modules": (
        "Its modules were distilled one by one from those of a teacher (m2mKD); then it was trained end to end",
        "distillation of all pairs, including the passes through the frozen networks, and end-to-end training",
    ),
    "upcycled": (
        "Its experts started as copies of a dense network's MLPs (sparse upcycling); then it was trained end to end",
        "training of the dense network, unless that is the teacher, and end-to-end training",
    ),
}
_TEACHER = (
    " to match the outputs of a teacher (ordinary distillation)",
    " to match the teacher's outputs, including the teacher's forward passes",
)


@dataclass(frozen=True)
class Source:
    """
    Where the weights come from that an arm starts from.

    Args:
        phase (`str`, *optional*): The phase that makes them and that counts as the arm's own.
        networks (`tuple[str, ...]`): The networks that are needed for it, and are not counted.
    """

    phase: str | None = None
    networks: tuple[str, ...] = ()


def sources(recipe: Mapping[str, Any]) -> dict[str, Source]:
    """
    The sources of the weights, by the arm's `init`.

    Args:
        recipe (`Mapping`): A recipe as plain values; the sections `distill` and `upcycle` are read.
    """
    distill, upcycle = recipe.get("distill") or {}, recipe.get("upcycle") or {}
    around = () if distill.get("context") == "teacher" else ("meta",)
    is_teacher, is_taught = (upcycle.get(key) == "teacher" for key in ("source", "supervision"))
    return {
        "random": Source(),
        "modules": Source("pairs", (*around, "teacher")),
        "upcycled": Source(None if is_teacher else "dense", ("teacher",) if is_teacher or is_taught else ()),
    }


@dataclass(frozen=True)
class Arm:
    """
    An arm of a run.

    Args:
        name (`str`): Its folder in `arms/`.
        spec (`ArmSpec`): Its four words.
        sibling (`str`, *optional*): An arm that differs only in the budget.
        source (`Source`): What the recipe says about the weights that it starts from.
    """

    name: str
    spec: ArmSpec
    sibling: str | None = None
    source: Source = Source()

    @property
    def is_modular(self) -> bool:
        """Whether it starts from distilled pairs."""
        return self.spec.init == "modules"

    @property
    def has_teacher(self) -> bool:
        """Whether its end-to-end phase learns from the teacher."""
        return self.spec.supervision == "teacher"

    @property
    def budget(self) -> str | None:
        """Name of the arm whose FLOPs it gets."""
        return None if self.spec.budget is None else self.spec.budget.flops_of

    @property
    def extra(self) -> tuple[str, ...]:
        """The networks that are trained beforehand and are not counted in the arm's own compute."""
        teacher = ("teacher",) if self.has_teacher else ()
        return tuple(dict.fromkeys([*self.source.networks, *teacher]))

    @property
    def text(self) -> str:
        """Description of the arm in one or two sentences, for its model card."""
        how = _TEACHER[0] if self.has_teacher else "" if self.is_modular else ", without a teacher"
        budget = "" if self.budget is None else f" It had as many epochs as the compute of {self.budget} allows."
        return f"{_INIT[self.spec.init][0]}{how}.{budget}"

    @property
    def covers(self) -> str:
        """Description of what its training compute covers."""
        budget = "" if self.budget is None else f"; as many epochs as {self.budget}'s FLOPs allow"
        return f"{_INIT[self.spec.init][1]}{_TEACHER[1] if self.has_teacher else ''}{budget}"

    def with_sibling(self, others: Iterable["Arm"]) -> "Arm":
        """Copy of the arm whose sibling is the one of `others` that differs only in the budget."""
        plain = self.spec.model_copy(update={"budget": None})
        names = [other.name for other in others if other.spec == plain and self.spec.budget is not None]
        return replace(self, sibling=next(iter(names), None))

    def described(self) -> dict[str, Any]:
        """The words, and the derived facts for reports and cards."""
        return {**self.words(), "text": self.text, "covers": self.covers, "extra": list(self.extra)}

    def words(self) -> dict[str, Any]:
        """The four words as plain values, for files."""
        return self.spec.model_dump(mode="json")


def named_specs(given: Any) -> dict[str, Any]:
    """
    Collect the arms of a recipe by name, from a list of names, a mapping from names to words, or a list of both. A
    preset gives the words that are missing.

    Raises:
        `ValueError`: a name is given twice, or a name without words is not a preset.
    """
    items = given if isinstance(given, list) else [given]
    specs: dict[str, Any] = {}
    for item in items:
        for name, words in (item if isinstance(item, dict) else {item: None}).items():
            if name in specs:
                raise ValueError(f"the arm {name!r} is given twice")
            if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"{name!r} cannot name an arm's folder; use letters, digits, _ and -")
            if name not in PRESETS and words is None:
                raise ValueError(
                    f"{name!r} is not a preset ({', '.join(PRESETS)}); define it, e.g. "
                    f"{{{name}: {{init: random, supervision: teacher, data: train}}}}"
                )
            if isinstance(words, ArmSpec):
                specs[name] = words
            elif words is None or isinstance(words, dict):
                base = PRESETS[name].model_dump(exclude_defaults=True) if name in PRESETS else {}
                specs[name] = {**base, **(words or {})}
            else:
                raise ValueError(f"the arm {name!r} is {words!r}; give a mapping of init, supervision, data, training")
    return specs


def resolve(
    specs: Mapping[str, ArmSpec], equal_compute: bool = False, recipe: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Arm]:
    """
    The arms of a run, in the order of its tables.

    Args:
        specs (`Mapping[str, ArmSpec]`): The arms of the recipe.
        equal_compute (`bool`): Whether to add each other arm again with the FLOPs of the first arm that starts from
            modules.
        recipe (`Mapping`): See [`sources`].

    Raises:
        `ValueError`: a budget refers to an arm that does not exist or has a budget itself.
    """
    compared = next((name for name, spec in specs.items() if _is_reference(spec)), None)
    arms: dict[str, Arm] = {}
    starts = sources(recipe)
    for name, spec in specs.items():
        arms[name] = Arm(name, spec, source=starts[spec.init])
        if equal_compute and compared not in (None, name) and spec.budget is None:
            budget = spec.model_copy(update={"budget": Budget(flops_of=compared)})
            arms[f"{name}{_EQUAL_COMPUTE}"] = replace(arms[name], name=f"{name}{_EQUAL_COMPUTE}", spec=budget)
    arms = {name: arm.with_sibling(arms.values()) for name, arm in arms.items()}
    for name, arm in arms.items():
        if arm.budget is not None and (arm.budget not in specs or specs[arm.budget].budget is not None):
            raise ValueError(
                f"the budget of the arm {name!r} is `flops_of: {arm.budget}`; name an arm of the recipe that has no "
                f"budget itself ({', '.join(other for other in specs if specs[other].budget is None)})"
            )
    return arms


def _is_reference(spec: ArmSpec) -> bool:
    return spec.init == "modules" and spec.budget is None


def arm_of_folder(
    name: str, words: Mapping[str, Any] | None, recipe: Mapping[str, Any] = MappingProxyType({})
) -> Arm | None:
    """
    Identify an arm that has a folder in a run but is not (or no longer) in the recipe.

    Args:
        name (`str`): Name of its folder.
        words (`Mapping`, *optional*): The words that its results record; `None` for old results, which record none.
        recipe (`Mapping`): See [`sources`].

    Returns:
        `Arm`; `None` if it cannot be identified.
    """
    if words is not None:
        spec = ArmSpec.model_validate({word: words[word] for word in ArmSpec.model_fields if word in words})
        return Arm(name, spec, source=sources(recipe)[spec.init])
    base = name.removesuffix(_EQUAL_COMPUTE)
    if base not in PRESETS:
        return None
    return resolve({base: PRESETS[base], _COMPARED: PRESETS[_COMPARED]}, base != name, recipe).get(name)


def reference(arms: Sequence[Arm]) -> Arm | None:
    """The arm that the others are compared with: the first that starts from modules and has no budget."""
    return next((arm for arm in arms if _is_reference(arm.spec)), None)


def colors(arms: Sequence[Arm]) -> dict[str, str]:
    """The color of each arm; an arm that differs from another only in the budget gets a lighter one."""
    further = [arm.name for arm in arms if arm.name not in _COLORS and arm.sibling is None]
    own = {name: _FURTHER_COLORS[place % len(_FURTHER_COLORS)] for place, name in enumerate(further)}
    plain = {**_COLORS, **own}
    return {arm.name: plain[arm.name] if arm.sibling is None else _lighter(plain[arm.sibling]) for arm in arms}


def _lighter(color: str) -> str:
    parts = [int(color[place : place + 2], 16) for place in (1, 3, 5)]
    return "#" + "".join(f"{round(part + 0.45 * (255 - part)):02X}" for part in parts)
