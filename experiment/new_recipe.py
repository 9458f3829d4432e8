"""A recipe for one's own images: what they, the teacher and this machine are, and the values that follow."""

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from m2mkd.data.config import IMAGEFOLDER_PREFIX, DataConfig
from m2mkd.data.dataset import ImageDataset
from m2mkd.data.labeled_images import LabeledImages
from m2mkd.data.processing import pixels_of_processor
from m2mkd.data.sources import load_images
from m2mkd.distillation.load import config_with_new_head, load_network_config, load_processor
from m2mkd.distillation.sizes import pair, vision_config
from m2mkd.distillation.split import count_layers, stage_class
from m2mkd.errors import DataError, RecipeError, StageError
from m2mkd.experiment.networks import build_config
from m2mkd.experiment.plan.plan import Plan, make_plan
from m2mkd.experiment.plan.step_cost import build_on_meta
from m2mkd.experiment.recipe import Recipe
from m2mkd.experiment.recipe_file import parse_recipe


# Patches on a side of an image without a given teacher, and the largest image that is not scaled down.
GRID, LARGEST = 6, 96
MEASURED_IMAGES = 256
# Updates of the weights that each phase gets if the time allows.
STEPS = {"teacher": 1500, "distill": 700, "finetune": 1500}
MIN_EPOCHS = 3
_TRAIN, _TEST = ("train", "training"), ("test", "val", "valid", "validation")


@dataclass(frozen=True)
class Images:
    """The sections of the data sets, and what is known of the training images."""

    sections: dict[str, dict[str, Any]]
    train: LabeledImages
    side: int
    is_gray: bool


@dataclass(frozen=True)
class Teacher:
    """A given teacher: its pixels, layers, width, patch, whether it can be cut, and whether it needs a new head."""

    source: str
    pixels: dict[str, Any]
    layers: int
    width: int
    patch: int
    can_be_cut: bool
    needs_probe: bool


def write_new_recipe(
    path: Path, source: str, test: str | None, ood: str | None, teacher: str | None, minutes: float
) -> list[str]:
    """
    Write a recipe that runs as it is.

    Args:
        path (`Path`): The file to write; it must not exist.
        source (`str`): A folder with one sub-folder per class, or with the folders `train` and `test` (and `ood`), or
            an id for `datasets`.
        test (`str`, *optional*): Folder of the test images. `None`: found in `source`, or a part of it is held out.
        ood (`str`, *optional*): Folder of a test on another distribution of the same classes.
        teacher (`str`, *optional*): Hub id or folder. `None`: a ViT is trained.
        minutes (`float`): Time that the run may take on this machine.

    Returns:
        Lines about what was found and chosen.

    Raises:
        `DataError`, `StageError`, `RecipeError`: images or teacher cannot be read, or do not fit each other.
    """
    if path.exists():
        raise RecipeError(f"{path} exists already. Give another file with --out, or remove it.")
    images = look_at_images(source, test, ood)
    given = None if teacher is None else look_at_teacher(teacher, images.train.class_names)
    content = _content(images, given, path.stem)
    recipe = parse_recipe(content, str(path))
    speed = measure_speed(recipe, images.train.class_names)
    content, recipe, plan = _fitted_to_time(content, minutes, speed)
    path.write_text(_commented(content, images, given, plan, speed), encoding="utf-8")
    total = sum(part.flops for part in plan.phases if not part.name.startswith("pair ")) / speed / 60
    return [
        f"{len(images.train):,} training images, {len(images.train.class_names)} classes, {images.side} pixels.",
        f"{os.cpu_count()} cores, {torch.cuda.device_count()} GPUs; about {total:.0f} minutes of training here.",
        f"The recipe is in {path}. Run it: m2mkd run {path}",
    ]


# ---- What there is ----


def look_at_images(source: str, test: str | None, ood: str | None) -> Images:
    """Find the splits of a source, and measure the training images."""
    root = Path(source).expanduser()
    if root.is_dir() and not any(root.rglob("*.parquet")):
        sections = _folder_sections(root, test, ood)
    else:
        sections = {"train": {"source": source, "split": "train"}, "iid": {"source": source, "split": "test"}}
        sections |= {"ood": {"source": f"{IMAGEFOLDER_PREFIX}{ood}"}} if ood else {}
    train = load_images(DataConfig(**sections["train"]))
    if len(train.class_names) < 2:
        raise DataError(f"{source} has one class, {train.class_names}. Give a folder with one sub-folder per class.")
    for name in ("iid", *(["ood"] if "ood" in sections else [])):
        load_images(DataConfig(**sections[name])).relabel(train.class_names)
    chosen = np.linspace(0, len(train) - 1, min(MEASURED_IMAGES, len(train))).round().astype(int)
    found = [train.images[int(index)] for index in chosen]
    gray = [np.ptp(np.asarray(image.resize((16, 16)), dtype=np.int16), axis=2).max() < 16 for image in found]
    return Images(sections, train, int(np.median([min(image.size) for image in found])), bool(np.mean(gray) > 0.95))


def _folder_sections(root: Path, test: str | None, ood: str | None) -> dict[str, dict[str, Any]]:
    inside = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    train = next((inside[name] for name in _TRAIN if name in inside), None)
    if train is not None:
        test = test or next((str(inside[name]) for name in _TEST if name in inside), None)
        ood = ood or (str(inside["ood"]) if "ood" in inside else None)
    folder = f"{IMAGEFOLDER_PREFIX}{train or root}"
    if test is not None:
        sections: dict[str, dict[str, Any]] = {"train": {"source": folder}}
        sections["iid"] = {"source": f"{IMAGEFOLDER_PREFIX}{test}"}
    else:
        held = {"source": folder, "holdout": 0.2}
        sections = {"train": {**held, "split": "train"}, "iid": {**held, "split": "test"}}
    return sections | ({"ood": {"source": f"{IMAGEFOLDER_PREFIX}{ood}"}} if ood else {})


def look_at_teacher(source: str, class_names: list[str]) -> Teacher:
    """Read the configuration and the image processor of a teacher; its weights are not read."""
    pixels = pixels_of_processor(load_processor(source), source)
    try:
        config = load_network_config(source)
        needs_probe = list(config.id2label.values()) != class_names
    except StageError:
        needs_probe = True
    if needs_probe:
        config = config_with_new_head(source, class_names)
    network = build_on_meta(config)
    sizes, can_be_cut = vision_config(config), stage_class(type(network)).can_be_cut(network)
    if not can_be_cut:
        return Teacher(source, pixels, 1, 0, pixels["image_size"] // GRID, False, needs_probe)
    own = count_layers(network), sizes.hidden_size, pair(sizes.patch_size)[0]
    return Teacher(source, pixels, *own, True, needs_probe)


def measure_speed(recipe: Recipe, class_names: list[str], steps: int = 5) -> float:
    """
    FLOPs a second of this machine when it does nothing else: the fastest of a few training steps of the recipe's
    student. On a CPU the time that the process itself computed counts, so that other programs do not make it slow.
    """
    data, batch = recipe.data["train"], recipe.training["per_device_train_batch_size"]
    counted = build_on_meta(build_config(recipe.student.model, data, class_names))
    with FlopCounterMode(display=False) as counter:
        counted(torch.empty(2, 3, data.image_size, data.image_size, device="meta")).logits.sum().backward()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    clock, threads = (time.process_time, torch.get_num_threads()) if device.type == "cpu" else (time.perf_counter, 1)
    # a configuration of its own: that of the counted network asks for plain, slow paths
    network: PreTrainedModel = type(counted)(build_config(recipe.student.model, data, class_names)).to(device)
    pixels = torch.randn(batch, 3, data.image_size, data.image_size, device=device)
    taken = []
    for _ in range(steps):
        start = clock()
        loss = network(pixels).logits.sum()
        loss.backward()
        # an item waits for the device
        loss.item()
        taken.append(clock() - start)
    return counter.get_total_flops() / 2 * batch * threads / min(taken)


# ---- What follows ----


def _content(images: Images, teacher: Teacher | None, name: str) -> dict[str, Any]:
    """The recipe with all epochs at their wanted length."""
    patch = max(2, round(min(images.side, LARGEST) / GRID)) if teacher is None else teacher.patch
    pixels = teacher.pixels if teacher is not None else _pixels(images, patch * GRID)
    train = {**pixels, "augmentation": "affine" if images.is_gray else "crop_flip"}
    train = {key: list(value) if isinstance(value, tuple) else value for key, value in train.items()}
    batch = 64 if len(images.train) >= 1000 else 32
    per_epoch = math.ceil(len(images.train) / batch)
    epochs = {phase: min(400, max(MIN_EPOCHS, math.ceil(steps / per_epoch))) for phase, steps in STEPS.items()}
    shape = {"patch_size": patch, "initializer_range": 0.1}
    student = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    own: dict[str, Any] = {
        "pretrained": None if teacher is None else str(teacher.source),
        "data": "train",
    }
    if teacher is None:
        layers = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 384}
        own = {"model": {"model_type": "vit", "config": {**layers, **shape}}, "depths": [2, 2], "data": "train"}
        own["finetuning"] = {"num_train_epochs": epochs["teacher"]}
    else:
        own["probe"] = teacher.needs_probe
        own |= {"depths": [teacher.layers // 2, teacher.layers - teacher.layers // 2]} if teacher.can_be_cut else {}
    is_modular = teacher is None or (teacher.can_be_cut and teacher.layers > 1)
    return {
        "name": name,
        "output_dir": f"runs/{name}",
        "arms": [{"kd": {"budget": {"flops_of": "m2mkd_kd"}}}, "m2mkd_kd"] if is_modular else ["kd"],
        "data": {
            "train": {**images.sections["train"], **train},
            "iid": images.sections["iid"],
            **({"ood": images.sections["ood"]} if "ood" in images.sections else {}),
        },
        "training": {
            "per_device_train_batch_size": batch,
            "per_device_eval_batch_size": 250,
            "learning_rate": 1e-3,
            "weight_decay": 0.05,
            "warmup_steps": 0.05,
            "lr_scheduler_type": "cosine",
        },
        "teacher": own,
        "student": {
            "model": {"model_type": "vmoe", "config": {**student, **shape, "num_experts": 4}},
            "depths": [2, 2],
        },
        "distill": {
            "data": "train",
            "context": "teacher",
            "match": "boundary",
            "training": {"num_train_epochs": epochs["distill"], "alpha": 1.0, "learning_rate": 2e-3},
        },
        "finetune": {"data": "train", "training": {"num_train_epochs": epochs["finetune"], "learning_rate": 2e-3}},
        "kd": {"training": {"alpha": 1.0}},
        "evaluation": {"iid": "iid", "ood": "ood" if "ood" in images.sections else None},
    }


def _pixels(images: Images, image_size: int) -> dict[str, Any]:
    """Image size and normalization, measured on training images."""
    plain = DataConfig(source="x", image_size=image_size, mean=(0.0,) * 3, std=(1.0,) * 3)
    chosen = np.linspace(0, len(images.train) - 1, min(MEASURED_IMAGES, len(images.train))).round().astype(int)
    found = ImageDataset(images.train.select(chosen), plain, train=False)
    values = torch.stack([found[index]["pixel_values"] for index in range(len(found))]).transpose(0, 1).flatten(1)
    mean, std = ([round(float(value), 4) for value in own] for own in (values.mean(dim=1), values.std(dim=1)))
    return {"image_size": image_size, "mean": mean, "std": [max(value, 0.01) for value in std]}


def _fitted_to_time(content: dict[str, Any], minutes: float, speed: float) -> tuple[dict[str, Any], Recipe, Plan]:
    """Shorten all epochs by the same factor until the plan fits the time. Raises `RecipeError` if it cannot."""
    trainings = [content["distill"]["training"], content["finetune"]["training"]]
    trainings += [content["teacher"]["finetuning"]] if "finetuning" in content["teacher"] else []
    for _ in range(2):
        recipe = parse_recipe(content, "the new recipe")
        plan = make_plan(recipe)
        needed = sum(part.flops for part in plan.phases if not part.name.startswith("pair ")) / speed / 60
        if needed <= minutes:
            break
        for own in trainings:
            own["num_train_epochs"] = max(MIN_EPOCHS, int(own["num_train_epochs"] * 0.95 * minutes / needed))
    else:
        raise RecipeError(
            f"Even {MIN_EPOCHS} epochs would take about {needed:.0f} minutes on this machine, but --minutes is "
            f"{minutes:g}. Give more time, fewer images, or a teacher with smaller images."
        )
    return content, recipe, plan


# ---- The file ----


def _commented(content: dict[str, Any], images: Images, teacher: Teacher | None, plan: Plan, speed: float) -> str:
    """The recipe as YAML, each section under the reason for its values and what the plan says that it costs."""
    costs = {
        part.name: f"{part.name}: {part.epochs:g} epochs of {part.images:,} images, {part.steps:,} steps, "
        f"{part.flops / 1e12:.3g} TFLOPs, about {max(part.flops / speed / 60, 0.1):.1f} minutes here"
        for part in plan.phases
        if not part.name.startswith("pair ")
    }
    of = {
        section: [text for name, text in costs.items() if name.startswith(start)] for section, start in _COSTS.items()
    }
    whys = _reasons(content, images, teacher)
    lines = [f"# Written by `m2mkd init`. Run it: m2mkd run {content['name']}.yaml", ""]
    for section, value in content.items():
        lines += [f"# {text}" for text in (*whys.get(section, []), *of.get(section, []))]
        lines += [yaml.safe_dump({section: value}, sort_keys=False, allow_unicode=True, width=110).rstrip()]
        lines += [""] if isinstance(value, dict) else []
    return "\n".join(lines).rstrip() + "\n"


_COSTS = {"teacher": "teacher", "distill": "pairs", "arms": "arm "}


def _reasons(content: dict[str, Any], images: Images, teacher: Teacher | None) -> dict[str, list[str]]:
    """Why the sections have their values."""
    data, classes = content["data"]["train"], images.train.class_names
    holdout = data.get("holdout")
    whys = {
        "arms": [
            "kd: the student learns the whole teacher's outputs. m2mkd_kd: first its modules learn the teacher's",
            "parts, then it learns the outputs; kd gets as much compute. Neither reads labels.",
        ],
        "data": [
            f"{len(images.train):,} images of {len(classes)} classes; median shorter side: {images.side} pixels.",
            f"{holdout:g} of each class is the test set." if holdout else "Training and test images are apart.",
            (
                "affine: small shifts and turns, no mirror images, because the pictures are gray (symbols, letters)."
                if images.is_gray
                else "crop_flip: crops and mirror images. For pictures that may not be mirrored: affine."
            ),
        ],
        "training": [
            "The batch gives this number of images enough updates an epoch; rate and decay are the digits recipe's.",
        ],
        "student": [
            "4 layers of width 64, 4 experts each, 2 a token; as many patches as the teacher, so that modules fit.",
            "initializer_range 0.1: at this width the usual 0.02 is so small that training crawls.",
        ],
        "distill": ["No labels; one pass through the teacher gives inputs and targets of all modules."],
        "finetune": ["The end-to-end phase of each arm; the longest, because it decides the accuracy."],
    }
    if teacher is None:
        whys["teacher"] = ["No teacher was given, so a ViT of 4 layers is trained on the same images."]
        size = f"image_size {data['image_size']}: {GRID} x {GRID} patches; mean and std were measured."
    else:
        whys["teacher"] = [f"{teacher.layers} layers of width {teacher.width}, patches of {teacher.patch} pixels."]
        whys["teacher"] += [
            "probe: its classes are not those of the data, so a linear head is fitted."
        ] * teacher.needs_probe
        size = "Size and normalization are those of the teacher's image processor."
    whys["data"].append(size)
    return whys
