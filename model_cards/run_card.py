"""The model card of a run's arm: what report.json says, in the form of `model_cards/template.md`."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any, get_args

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from m2mkd.data.config import IMAGEFOLDER_PREFIX, PackagedSource
from m2mkd.data.known_sets import known_set
from m2mkd.model_cards.parts import ROUTING_FILE, citation, model_facts, template, usage_section
from m2mkd.model_cards.tables import compute_section, markdown_table, results_section, teacher_hub_id, teacher_text


_UNPUBLISHED = ("output_dir", "processes")
_PATH = re.compile(r"^(/|~|\.{1,2}[/\\]|[A-Za-z]:[/\\])")


def run_card(
    report: dict[str, Any],
    config: PreTrainedConfig,
    run_name: str,
    arm: str,
    source: str,
    seed: int,
    with_code: bool = False,
    pairs: str | None = None,
    license: str = "apache-2.0",
    examples: Sequence[str] = (),
    has_routing: bool = False,
) -> ModelCard:
    """
    The model card of one arm, metadata (model-index) included.

    Args:
        report (`dict[str, Any]`): The report of the run, in which every arm says what it is.
        config (`PreTrainedConfig`): The arm's.
        run_name (`str`): Name of the run's folder.
        arm (`str`): Name of the arm.
        source (`str`): What a reader gives to `from_pretrained`: a Hub id or a folder.
        seed (`int`): Seed of the arm.
        with_code (`bool`): Whether the model's code lies beside the weights.
        pairs (`str`, *optional*): What a reader gives to `m2mkd assemble`: the Hub id or folder with the `pairs/` that
            the arm was made of.
        license (`str`): The licence of the weights, as the Hub names it.
        examples (`Sequence[str]`): Paths of images in the repository, for the widget of its page.
        has_routing (`bool`): Whether `routing.png` lies beside the card.
    """
    result = report["seeds"][str(seed)]["arms"][arm]
    recipe = public_recipe(report["recipe"], run_name)
    name = PurePath(source).name
    # in a run's folder an arm is called only by its method
    data = card_data(report, result, f"{recipe['name']}-{arm}" if name == arm else name, license, examples)
    return ModelCard.from_template(
        data,
        template_str=template("template.md"),
        title=data.model_name,
        **model_facts(config, result["parameters"]),
        routing=ROUTING_FILE if has_routing else None,
        arm=arm,
        arm_text=_arm_text(result["arm"], report),
        recipe_name=recipe.get("name"),
        seed=seed,
        usage=usage_section(source, with_code),
        pairs=pairs,
        last_pair=len(recipe["student"]["depths"]) - 1,
        results=results_section(report),
        device=report["device"],
        versions=", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        data=_data_section(report, recipe),
        compute=compute_section(report),
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
        limits=_limits(report, result),
        license=license,
        citation=citation(config.model_type),
    )


def card_data(
    report: dict[str, Any], result: dict[str, Any], name: str, license: str, examples: Sequence[str] = ()
) -> ModelCardData:
    """The metadata of a card; the results are those of the weights themselves, one seed."""
    recipe = report["recipe"]
    model_type = recipe["student"]["model"]["model_type"]
    tests = {split: recipe["evaluation"].get(split) for split in ("iid", "ood")}
    sources = [recipe["data"][name]["source"] for name in _data_users(report).values()]
    ids = {hub_id(source) for source in sources} - {None}
    teacher = report["teacher"] if "teacher" in result["arm"]["extra"] else None
    return ModelCardData(
        model_name=name,
        license=license,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=list(dict.fromkeys(["m2mkd", model_type, "knowledge-distillation", "image-classification"])),
        base_model=None if teacher is None else teacher_hub_id(teacher),
        datasets=sorted(ids) or None,
        **({"widget": [{"src": path, "example_title": PurePath(path).stem} for path in examples]} if examples else {}),
        metrics=["accuracy"],
        eval_results=[
            _eval_result(data, recipe["data"][data], result[split]["accuracy"])
            for split, data in tests.items()
            if data is not None and result[split] is not None
        ],
    )


def public_recipe(recipe: dict[str, Any], name: str) -> dict[str, Any]:
    """
    A recipe as a stranger may read it: no token, and of every path of this machine only the last part.

    Args:
        recipe (`dict[str, Any]`): As `report.json` has it.
        name (`str`): Name of the run's folder; becomes `runs/<name>`.
    """
    kept = {key: _published(value) for key, value in recipe.items() if key not in _UNPUBLISHED}
    return {**kept, "output_dir": f"runs/{name}"}


def _published(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _published(item) for key, item in value.items() if "token" not in str(key)}
    if isinstance(value, list):
        return [_published(item) for item in value]
    if not isinstance(value, str):
        return value
    prefix = IMAGEFOLDER_PREFIX if value.startswith(IMAGEFOLDER_PREFIX) else ""
    path = value.removeprefix(prefix)
    # a Windows path splits at both slashes
    return f"{prefix}{PureWindowsPath(path).name}" if prefix or _PATH.match(path) else value


def _kind(source: str) -> str:
    """`imagefolder`, a packaged set, `local` for a folder read by `datasets`, or `datasets` for a Hub id."""
    if source.startswith(IMAGEFOLDER_PREFIX):
        return "imagefolder"
    if source in get_args(PackagedSource):
        return source
    return "local" if _PATH.match(source) or Path(source).exists() else "datasets"


def hub_id(source: str) -> str | None:
    """The Hub id of a data source, also of a local copy of a published set; `None` if it is not known to have one."""
    known = known_set(source)
    if known is not None:
        return known.hub
    return source if _kind(source) == "datasets" else None


def _eval_result(name: str, section: dict[str, Any], accuracy: float) -> EvalResult:
    kind = _kind(section["source"])
    return EvalResult(
        task_type="image-classification",
        dataset_type=hub_id(section["source"]) or kind,
        dataset_name=f"{name} ({_published(section['source'])})",
        dataset_config=section.get("config_name"),
        # huggingface_hub takes results of one type, configuration and split for those of one set
        dataset_split=section.get("split") or name,
        metric_type="accuracy",
        metric_name="Accuracy",
        metric_value=accuracy,
    )


def _arm_text(arm: dict[str, Any], report: dict[str, Any]) -> str:
    return f"{arm['text']} {teacher_text(report['teacher'])}" if "teacher" in arm["extra"] else arm["text"]


def _data_users(report: dict[str, Any]) -> dict[str, str]:
    """Names of the sets that the run used, by what it used them for."""
    recipe, teacher = report["recipe"], report["teacher"]
    is_distilled = any(result["arm"]["init"] == "modules" for result in report["arms"].values())
    users = {
        "meta model": recipe["meta"]["data"] if report["meta"] else None,
        "teacher": recipe["teacher"].get("data") if teacher and not teacher.get("pretrained") else None,
        "distillation": recipe["distill"]["data"] if is_distilled else None,
        "end-to-end training": recipe["finetune"]["data"],
        "IID test": recipe["evaluation"]["iid"],
        "OOD test": recipe["evaluation"].get("ood"),
    }
    return {user: name for user, name in users.items() if name is not None}


def _data_section(report: dict[str, Any], recipe: dict[str, Any]) -> str:
    rows = []
    for user, name in _data_users(report).items():
        section = recipe["data"][name]
        share = section.get("samples_per_class")
        images = f"{share} of each class" if share else "all"
        rows.append([user, name, section["source"], section.get("split") or "–", images, section["augmentation"]])
    return markdown_table(("Used for", "Name", "Source", "Split", "Images", "Augmentation"), rows)


def _limits(report: dict[str, Any], result: dict[str, Any]) -> str:
    points = [
        "It knows the classes of its training data and no others: whatever the image, it answers with one of them.",
        f"Its IID accuracy was measured on {result['iid']['n']:,} images"
        + (f", the OOD accuracy on {result['ood']['n']:,}." if result["ood"] else "; on no shifted distribution."),
        "Nothing else was measured: no calibration, no fairness between groups, no robustness against attacks.",
    ]
    if len(report["seeds"]) == 1:
        points.append("The arms were trained with one seed: a small difference between them may be chance.")
    return "\n".join(f"- {point}" for point in points)
