"""A section of a recipe: checked fields, and training arguments that the runner passes on."""

from dataclasses import fields
from enum import Enum
from typing import Any, ClassVar, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, field_validator

from m2mkd.trainer.m2mkd_config import M2MKDConfig


# What the runner sets itself, from other keys of the recipe.
_SET_BY_THE_RUNNER = {
    "output_dir",
    "seed",
    "data_seed",
    "student_depths",
    "teacher_depths",
    "meta_depths",
    "pairs",
    "remove_unused_columns",
    "resume_from_checkpoint",
}
_TRAINING_TYPES = {
    field.name: get_type_hints(M2MKDConfig)[field.name]
    for field in fields(M2MKDConfig)
    if field.init and field.name not in _SET_BY_THE_RUNNER
}
# They weigh a teacher; elsewhere there is none, and they would be ignored.
_LOSS_ARGUMENTS = {
    "alpha",
    "temperature",
    "distillation_type",
    "kl_reduction",
    "stitch",
    "nac_codes",
    "read_in_latents",
}
Training = dict[str, Any]


class Section(BaseModel):
    """A section of a recipe. Unknown keys and wrong types are refused; its training arguments are checked by name."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    _has_teacher: ClassVar[bool] = False

    @field_validator("training", "incubation", "finetuning", mode="before", check_fields=False)
    @classmethod
    def _none_given(cls, training: Training | None) -> Training:
        # how a recipe drops the arguments of the one that it extends
        return {} if training is None else training

    @field_validator("training", "incubation", "finetuning", check_fields=False)
    @classmethod
    def _check_training(cls, training: Training) -> Training:
        return check_training(training, cls._has_teacher)


def check_training(training: Training, has_teacher: bool) -> Training:
    """
    Check training arguments by name and type.

    Args:
        training (`dict`): Fields of `M2MKDConfig`.
        has_teacher (`bool`): Whether the phase learns from a teacher.

    Raises:
        `ValueError`: an argument that does not exist, that the runner sets, that needs a teacher, or of a wrong type.
    """
    for name, value in training.items():
        if name in _SET_BY_THE_RUNNER:
            raise ValueError(f"`{name}` is set by the runner from other keys of the recipe; leave it out here")
        if name == "push_to_hub" and value:
            raise ValueError("`push_to_hub` would push single phases; push an arm of the run with `m2mkd push`")
        if name in _LOSS_ARGUMENTS and not has_teacher:
            raise ValueError(f"`{name}` belongs to distill.training or kd.training; this phase has no teacher")
        if name not in _TRAINING_TYPES:
            raise ValueError(f"`{name}` is no argument of transformers.TrainingArguments or m2mkd.M2MKDConfig")
        try:
            TypeAdapter(_TRAINING_TYPES[name]).validate_python(value, strict=True)
        except ValidationError as error:
            raise ValueError(f"`{name}` is {value!r}: {rule_of(error.errors()[0])}") from error
        choices = _choices(name)
        if choices and value not in (None, *choices):
            raise ValueError(f"`{name}` is {value!r}; use one of {', '.join(choices)}")
    return training


def _choices(argument: str) -> list[str]:
    """The values of a training argument that has a fixed list of them."""
    kind = _TRAINING_TYPES[argument]
    enums = [part for part in (kind, *get_args(kind)) if isinstance(part, type) and issubclass(part, Enum)]
    return [member.value for enum in enums for member in enum]


def rule_of(problem: Any) -> str:
    """What pydantic says about a value, in YAML's words."""
    if problem["type"] in ("bool_type", "bool_parsing"):
        return "it should be true or false"
    return problem["msg"].removeprefix("Value error, ")
