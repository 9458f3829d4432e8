"""A recipe that runs in seconds: three classes of 8x8 colour patches in an image folder, tiny networks, few steps."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedModel

from m2mkd.data.config import DataConfig
from m2mkd.data.processing import build_image_processor
from m2mkd.experiment.recipe import Recipe
from m2mkd.experiment.recipe_file import parse_recipe


CLASS_NAMES = ["blue", "green", "red"]


def write_images(folder: Path, per_class: int = 8, class_names: list[str] = CLASS_NAMES, seed: int = 0) -> Path:
    """Noisy patches of one colour a class, one sub-folder a class."""
    rng = np.random.default_rng(seed)
    for name in class_names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        base = np.zeros(3)
        base[["red", "green", "blue"].index(name) if name in CLASS_NAMES else 0] = 120
        for index in range(per_class):
            pixels = np.clip(base + rng.uniform(0, 120, size=(8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def recipe_content(folder: Path, **changes: Any) -> dict[str, Any]:
    """The recipe as YAML would give it; `changes` are whole top-level sections."""
    network = {"num_attention_heads": 2, "patch_size": 4}
    train, test = write_images(folder / "train"), write_images(folder / "test", per_class=3, seed=1)
    pixels = {"image_size": 8, "resample": "bilinear"}
    content = {
        "name": "tiny",
        "output_dir": str(folder / "run"),
        "data": {
            "train": {"source": f"imagefolder:{train}", "augmentation": "affine", **pixels},
            "labelled": {"source": f"imagefolder:{train}", "samples_per_class": 4, **pixels},
            "iid": {"source": f"imagefolder:{test}"},
            "ood": {"source": f"imagefolder:{test}", "samples_per_class": 2},
        },
        "training": {"num_train_epochs": 2, "per_device_train_batch_size": 6, "learning_rate": 1e-3},
        "meta": {
            "model": _model("vit", hidden_size=12, num_hidden_layers=2, intermediate_size=20, **network),
            "data": "train",
        },
        "teacher": {
            "model": _model("vit", hidden_size=12, num_hidden_layers=3, intermediate_size=20, **network),
            "depths": [2, 1],
            "data": "train",
        },
        "student": {
            "model": _model(
                "vmoe", hidden_size=8, num_hidden_layers=2, intermediate_size=16, num_experts=2, **network
            ),
            "depths": [1, 1],
        },
        "distill": {"data": "train", "training": {"eval_strategy": "epoch"}},
        "finetune": {"data": "labelled", "training": {"eval_strategy": "epoch"}},
        "evaluation": {"iid": "iid", "ood": "ood"},
    }
    return {**content, **changes}


def tiny_recipe(folder: Path, **changes: Any) -> Recipe:
    return parse_recipe(recipe_content(folder, **changes), "the tiny recipe")


def published(folder: Path, model: PreTrainedModel, **pixels: Any) -> Path:
    """A model with the image processor of the recipe's images, but for `pixels`, as one finds it on the Hub."""
    model.save_pretrained(folder)
    build_image_processor(DataConfig(source="x", image_size=8, resample="bilinear", **pixels)).save_pretrained(folder)
    return folder


def _model(model_type: str, **config: Any) -> dict[str, Any]:
    return {"model_type": model_type, "config": config}
