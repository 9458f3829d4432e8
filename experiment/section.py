"""A section of a recipe: checked fields, and training arguments that the runner passes on."""

from dataclasses import fields
from enum import Enum
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError, field_validator

from m2mkd.trainer.m2mkd_config import M2MKDConfig


# Arguments that the runner sets itself, from other keys of the recipe.
_SET_BY_THE_RUNNER = {
    "output_dir",
    "seed",
    "data_seed",
    "student_depths",
    "teacher_depths",
    "meta_depths",
    "pairs",
    "context",
    "match",
    "feed",
    "stitch_init",
    "remove_unused_columns",
    "resume_from_checkpoint",
}
_TRAINING_TYPES = {
    field.name: get_type_hints(M2MKDConfig)[field.name]
    for field in fields(M2MKDConfig)
    if field.init and field.name not in _SET_BY_THE_RUNNER
}
# Arguments that concern a teacher; in phases without one they would be ignored.
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


def _one_folder(name: str) -> str:
    is_short = 0 < len(name.encode(errors="replace")) <= 100
    if not is_short or name.startswith(".") or {"/", "\\", "\0", "\n"} & set(name):
        raise ValueError("a name must be that of one folder: 1 to 100 bytes, without slashes and no dot in front")
    return name


# Of an arm, a data set or a curve, for which a run has a folder.
FolderName = Annotated[str, AfterValidator(_one_folder)]


class Section(BaseModel):
    """A section of a recipe. Unknown keys and wrong types are refused; its training arguments are checked by name."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    _has_teacher: ClassVar[bool] = False

    @field_validator("training", "incubation", "finetuning", mode="before", check_fields=False)
    @classmethod
    def _none_given(cls, training: Training | None) -> Training:
        # null: how a recipe drops the arguments of the recipe that it extends
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
        `ValueError`: an argument does not exist, is set by the runner, needs a teacher, or has a wrong type.
    """
    for name, value in training.items():
        if name in _SET_BY_THE_RUNNER:
            raise ValueError(f"`{name}` is set by the runner from other keys of the recipe; leave it out here")
        if name == "push_to_hub" and value:
            raise ValueError("`push_to_hub` would push single phases; leave it out, and push an arm with `m2mkd push`")
        if name == "hub_token":
            raise ValueError("`hub_token` would be written into reports; log in with `hf auth login`, or set HF_TOKEN")
        if name in _LOSS_ARGUMENTS and not has_teacher:
            raise ValueError(
                f"`{name}` needs a teacher, which this phase does not have; set it in distill.training or kd.training"
            )
        if name not in _TRAINING_TYPES:
            raise ValueError(f"`{name}` is not an argument of transformers.TrainingArguments or m2mkd.M2MKDConfig")
        try:
            TypeAdapter(_TRAINING_TYPES[name]).validate_python(value, strict=True)
        except ValidationError as error:
            raise ValueError(f"`{name}` is {value!r}: {rule_of(error.errors()[0])}") from error
        choices = _choices(name)
        if choices and value not in (None, *choices):
            raise ValueError(f"`{name}` is {value!r}; use one of {', '.join(choices)}")
    return training


def _choices(argument: str) -> list[str]:
    """The possible values of a training argument, if they are a fixed list."""
    kind = _TRAINING_TYPES[argument]
    enums = [part for part in (kind, *get_args(kind)) if isinstance(part, type) and issubclass(part, Enum)]
    return [member.value for enum in enums for member in enum]


def rule_of(problem: Any) -> str:
    """Pydantic's message about a value, in terms of YAML."""
    if problem["type"] in ("bool_type", "bool_parsing"):
        return "it should be true or false"
    return problem["msg"].removeprefix("Value error, ")
