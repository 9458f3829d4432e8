"""The model card of a run's arm: what report.json says, in the form of `model_cards/template.md`."""

import json
import re
from collections.abc import Iterable
from importlib import metadata, resources
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any, get_args

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Template
from transformers import AutoConfig, PreTrainedConfig

from m2mkd.data.config import IMAGEFOLDER_PREFIX, PackagedSource
from m2mkd.experiment.arms import arm_of_folder
from m2mkd.model_cards.tables import compute_section, markdown_table, results_section
from m2mkd.trainer.folders import check_is_run, explained_write_errors
from m2mkd.trainer.hub import HubError
from m2mkd.trainer.m2mkd_config import M2MKDConfig


REPORT_FILE = "report.json"
CARD_FILE = "README.md"
ARCHITECTURES = {"nac": "A Neural Attentive Circuit", "vmoe": "A vision mixture of experts (V-MoE)"}
CITATIONS = {
    "m2mkd": """@misc{lo2024m2mkd,
    title={m2mKD: Module-to-Module Knowledge Distillation for Modular Transformers},
    author={Ka Man Lo and Yiming Liang and Wenyu Du and Yuantao Fan and
            Zili Wang and Wenhao Huang and Lei Ma and Jie Fu},
    year={2024},
    eprint={2402.16918},
    archivePrefix={arXiv}
}""",
    "nac": """@misc{weiss2022nac,
    title={Neural Attentive Circuits},
    author={Martin Weiss and Nasim Rahaman and Francesco Locatello and Chris Pal and Yoshua Bengio and
            Bernhard Schölkopf and Li Erran Li and Nicolas Ballas},
    year={2022},
    eprint={2210.08031},
    archivePrefix={arXiv}
}""",
    "vmoe": """@misc{riquelme2021vmoe,
    title={Scaling Vision with Sparse Mixture of Experts},
    author={Carlos Riquelme and Joan Puigcerver and Basil Mustafa and Maxim Neumann and Rodolphe Jenatton and
            André Susano Pinto and Daniel Keysers and Neil Houlsby},
    year={2021},
    eprint={2106.05974},
    archivePrefix={arXiv}
}""",
}
# Of a training without a recipe.
_SHOWN_ARGUMENTS = (
    *(
        "student_depths",
        "teacher_depths",
        "meta_depths",
        "pairs",
        "stitch",
        "distillation_type",
        "alpha",
        "temperature",
    ),
    *("learning_rate", "weight_decay", "num_train_epochs", "max_steps", "per_device_train_batch_size", "seed"),
)
_UNPUBLISHED = ("output_dir", "processes")
_PATH = re.compile(r"^(/|~|\.{1,2}[/\\]|[A-Za-z]:[/\\])")


def write_cards(run_folder: str | Path) -> list[Path]:
    """
    Write `README.md` into the folder of every arm of a run, those of its further seeds included.

    Args:
        run_folder (`str` or `Path`): A finished run, with its `report.json`.

    Returns:
        `list[Path]`: The cards.

    Raises:
        `HubError`: there is no report, or it is damaged.
        `RunError`: a folder cannot be written.
    """
    run_folder = Path(run_folder)
    report, cards = read_report(run_folder), []
    for seed, own in report["seeds"].items():
        for arm, result in own["arms"].items():
            seed_folder = folder_of_seed(run_folder, report, int(seed))
            folder = seed_folder / "arms" / arm
            pairs = str(seed_folder) if result["arm"]["init"] == "modules" else None
            with explained_write_errors(folder):
                render_card(run_folder, arm, str(folder), seed=int(seed), pairs=pairs).save(folder / CARD_FILE)
            cards.append(folder / CARD_FILE)
    return cards


def folder_of_seed(run_folder: Path, report: dict[str, Any], seed: int) -> Path:
    """Where the pairs and arms of a seed lie."""
    return run_folder if seed == report["seed"] else run_folder / "seeds" / str(seed)


def render_card(
    run_folder: str | Path,
    arm: str,
    source: str,
    seed: int | None = None,
    with_code: bool = False,
    pairs: str | None = None,
    license: str = "apache-2.0",
) -> ModelCard:
    """
    The model card of one arm, metadata (model-index) included.

    Args:
        run_folder (`str` or `Path`): A finished run, with its `report.json`.
        arm (`str`): A folder in its `arms/`.
        source (`str`): What a reader gives to `from_pretrained`: a Hub id or a folder.
        seed (`int`, *optional*): Seed of the arm. `None`: the run's first.
        with_code (`bool`): Whether the model's code lies beside the weights.
        pairs (`str`, *optional*): What a reader gives to `m2mkd assemble`: the Hub id or folder with the `pairs/` that
            the arm was made of.
        license (`str`): The licence of the weights, as the Hub names it.

    Raises:
        `HubError`: there is no report, it is damaged, or the seed or arm is not in it.
    """
    run_folder = Path(run_folder)
    report = read_report(run_folder)
    seed = report["seed"] if seed is None else seed
    result = result_of(report, run_folder, arm, seed)
    config = AutoConfig.from_pretrained(folder_of_seed(run_folder, report, seed) / "arms" / arm)
    recipe = public_recipe(report["recipe"], run_folder.resolve().name)
    name = PurePath(source).name
    # in a run's folder an arm is called by its method alone
    data = card_data(report, result, f"{recipe['name']}-{arm}" if name == arm else name, license)
    return ModelCard.from_template(
        data,
        template_str=_template("template.md"),
        title=data.model_name,
        **_model_facts(config, result["parameters"]),
        arm=arm,
        arm_text=_arm_text(result["arm"], report),
        recipe_name=recipe.get("name"),
        seed=seed,
        usage=_usage(source, with_code),
        pairs=pairs,
        last_pair=len(recipe["student"]["depths"]) - 1,
        results=results_section(report),
        device=report["device"],
        versions=", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        data=_data_section(recipe),
        compute=compute_section(report),
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
        limits=_limits(report, result),
        license=license,
        citation=_citation(config.model_type),
    )


def _model_facts(config: PreTrainedConfig, parameters: int) -> dict[str, Any]:
    """What both templates say of a model."""
    return {
        "architecture": ARCHITECTURES.get(config.model_type, f"A {config.model_type}"),
        "parameters": f"{parameters:,}",
        "num_labels": config.num_labels,
        "image_size": config.image_size,
    }


def render_trainer_card(
    config: PreTrainedConfig,
    args: M2MKDConfig,
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
        args ([`M2MKDConfig`])
        source (`str`): What a reader gives to `from_pretrained` or `m2mkd assemble`.
        parameters (`int`): Number of parameters of the student.
        metrics (`dict[str, float]`): The last evaluation.
        license (`str`, *optional*): The licence of the weights, as the Hub names it.
        tags (`Iterable[str]`): Beside those of every student.
        datasets (`list[str]`, *optional*): Hub ids of the training data.
    """
    arguments = {name: getattr(args, name) for name in _SHOWN_ARGUMENTS}
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
        template_str=_template("trainer.md"),
        title=data.model_name,
        **_model_facts(config, parameters),
        method=_method(args),
        is_whole=args.num_pairs == 1 or args.pairs == "all",
        usage=_usage(source, with_code=False),
        source=source,
        arguments=yaml.safe_dump({name: value for name, value in arguments.items() if value is not None}),
        results=results,
        versions=", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers")),
        license=license,
        citation=_citation(config.model_type),
    )


def _method(args: M2MKDConfig) -> str:
    if args.num_pairs > 1:
        indices = ", ".join(map(str, args.pair_indices))
        return f"Of its {args.num_pairs} modules these were distilled, each by itself: {indices}."
    if args.alpha > 0:
        return "It was trained towards the outputs of a teacher (ordinary distillation)."
    return "It was trained end to end, without a teacher."


def _is_metric(name: str) -> bool:
    return name.startswith("eval_") and not name.endswith(("runtime", "per_second"))


def _usage(source: str, with_code: bool) -> str:
    return Template(_template("usage.md")).render(source=source, with_code=with_code).strip("\n")


def _citation(model_type: str) -> str:
    return "\n\n".join(CITATIONS[name] for name in ("m2mkd", model_type) if name in CITATIONS)


def _template(name: str) -> str:
    return resources.files("m2mkd.model_cards").joinpath(name).read_text(encoding="utf-8")


def read_report(run_folder: Path) -> dict[str, Any]:
    """`report.json` of a run. Raises `HubError` if it is missing or damaged, `RunError` if the folder is no run."""
    path = run_folder / REPORT_FILE
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        check_is_run(run_folder)
        raise HubError(
            f"{path} is missing: a card tells what was measured. Finish the run, or write the report again with "
            f"`m2mkd report {run_folder}`."
        ) from error
    except ValueError as error:
        raise HubError(f"{path} is damaged ({error}). Write it again with `m2mkd report {run_folder}`.") from error
    for own in (report, *report["seeds"].values()):
        for name, result in own["arms"].items():
            # reports of earlier versions name presets only
            arm = arm_of_folder(name, result.get("arm"))
            result["arm"] = None if arm is None else arm.described()
    return report


def result_of(report: dict[str, Any], run_folder: Path, arm: str, seed: int) -> dict[str, Any]:
    """What the report says of one arm. Raises `HubError` if it has no such seed or arm."""
    seeds = report["seeds"]
    if str(seed) not in seeds:
        raise HubError(f"{run_folder / REPORT_FILE} has no seed {seed}, only {', '.join(seeds)}.")
    arms = seeds[str(seed)]["arms"]
    if arm not in arms:
        raise HubError(f"{run_folder / REPORT_FILE} has no arm {arm!r}, only {', '.join(arms)}.")
    return arms[arm]


def card_data(report: dict[str, Any], result: dict[str, Any], name: str, license: str) -> ModelCardData:
    """The metadata of a card; the results are those of the weights themselves, one seed."""
    recipe = report["recipe"]
    model_type = recipe["student"]["model"]["model_type"]
    tests = {split: recipe["evaluation"].get(split) for split in ("iid", "ood")}
    ids = [section["source"] for section in recipe["data"].values() if _kind(section["source"]) == "datasets"]
    return ModelCardData(
        model_name=name,
        license=license,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=list(dict.fromkeys(["m2mkd", model_type, "knowledge-distillation", "image-classification"])),
        datasets=sorted(set(ids)) or None,
        metrics=["accuracy"],
        eval_results=[
            _eval_result(data, recipe["data"][data], result[split]["accuracy"])
            for split, data in tests.items()
            if data is not None and result[split] is not None
        ],
    )


def public_recipe(recipe: dict[str, Any], name: str) -> dict[str, Any]:
    """
    A recipe as a stranger may read it: no token, and of every path of this machine the last part alone.

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


def _eval_result(name: str, section: dict[str, Any], accuracy: float) -> EvalResult:
    kind = _kind(section["source"])
    return EvalResult(
        task_type="image-classification",
        dataset_type=section["source"] if kind == "datasets" else kind,
        dataset_name=f"{name} ({_published(section['source'])})",
        dataset_config=section.get("config_name"),
        # huggingface_hub takes results of one type, configuration and split for those of one set
        dataset_split=section.get("split") or name,
        metric_type="accuracy",
        metric_name="Accuracy",
        metric_value=accuracy,
    )


def _arm_text(arm: dict[str, Any], report: dict[str, Any]) -> str:
    text, teacher = arm["text"], report["teacher"] or {}
    if "teacher" in arm["extra"] and teacher.get("pretrained"):
        text += f" The teacher is {_published(teacher['pretrained'])}."
    return text


def _data_section(recipe: dict[str, Any]) -> str:
    users = {
        "meta model": recipe["meta"]["data"],
        "teacher": recipe["teacher"].get("data"),
        "distillation": recipe["distill"]["data"],
        "end-to-end training": recipe["finetune"]["data"],
        "IID test": recipe["evaluation"]["iid"],
        "OOD test": recipe["evaluation"].get("ood"),
    }
    rows = []
    for user, name in users.items():
        if name is not None:
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
