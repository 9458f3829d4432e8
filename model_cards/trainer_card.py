"""The model card of what a trainer pushes, without a run around it."""

from collections.abc import Iterable
from importlib import metadata
from pathlib import PurePath

import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig, TrainingArguments

from m2mkd.model_cards.parts import citation, model_facts, template, usage_section
from m2mkd.model_cards.tables import markdown_table


# Of a training without a recipe.
SHOWN_ARGUMENTS = (
    *("student_depths", "teacher_depths", "meta_depths", "pairs", "stitch"),
    *("distillation_type", "alpha", "temperature"),
    *("learning_rate", "weight_decay", "num_train_epochs", "max_steps", "per_device_train_batch_size", "seed"),
)


def render_trainer_card(
    config: PreTrainedConfig,
    args: TrainingArguments,
    method: str,
    is_whole: bool,
    source: str,
    parameters: int,
    metrics: dict[str, float],
    license: str | None = None,
    tags: Iterable[str] = (),
    datasets: list[str] | None = None,
) -> ModelCard:
    """
    The model card of what a trainer pushes, without a run around it.

    Args:
        config (`PreTrainedConfig`): The student's.
        args (`TrainingArguments`): Of the trainer; those of `SHOWN_ARGUMENTS` are listed.
        method (`str`): How it was trained, in a sentence.
        is_whole (`bool`): Whether the folder holds the whole student, not only some of its modules.
        source (`str`): What a reader gives to `from_pretrained` or `m2mkd assemble`.
        parameters (`int`): Number of parameters of the student.
        metrics (`dict[str, float]`): The last evaluation.
        license (`str`, *optional*): The licence of the weights, as the Hub names it.
        tags (`Iterable[str]`): Beside those of every student.
        datasets (`list[str]`, *optional*): Hub ids of the training data.
    """
    arguments = {name: getattr(args, name) for name in SHOWN_ARGUMENTS}
    evaluated = {name.removeprefix("eval_"): value for name, value in sorted(metrics.items()) if _is_metric(name)}
    rows = [[name, f"{value:.4f}"] for name, value in evaluated.items()]
    results = f"The last evaluation:\n\n{markdown_table(('Metric', 'Value'), rows)}" if rows else "Not evaluated."
    data = ModelCardData(
        model_name=PurePath(source).name,
        license=license,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=list(dict.fromkeys(["m2mkd", config.model_type, "image-classification", *tags])),
        datasets=datasets,
    )
    return ModelCard.from_template(
        data,
        template_str=template("trainer.md"),
        title=data.model_name,
        **model_facts(config, parameters),
        method=method,
        is_whole=is_whole,
        usage=usage_section(source, with_code=False),
        source=source,
        arguments=yaml.safe_dump({name: value for name, value in arguments.items() if value is not None}),
        results=results,
        versions=", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers")),
        license=license,
        citation=citation(config.model_type),
    )


def _is_metric(name: str) -> bool:
    return name.startswith("eval_") and not name.endswith(("runtime", "per_second"))
