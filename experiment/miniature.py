"""A recipe in miniature: the same phases on tiny networks and a few images, in seconds."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from m2mkd.configuration.configuration_nac import NAC_PRESETS
from m2mkd.configuration.configuration_vmoe import VMOE_PRESETS
from m2mkd.data.imagenet_classes import imagenet_classes
from m2mkd.data.known_sets import PACKAGED_SPLITS
from m2mkd.data.layouts import WRITERS
from m2mkd.distillation.load import load_network_config
from m2mkd.errors import DataError
from m2mkd.experiment.recipe import Recipe
from m2mkd.experiment.recipe_file import parse_recipe
from m2mkd.experiment.recipe_networks import RecipeNetworks, class_names_without_images
from m2mkd.experiment.run_data import RunData
from m2mkd.screen import Screen


IMAGES_PER_CLASS = 3
PATCH_SIZE = 8
# Sizes of the recipe's largest images and of all others: if phases have different sizes, they keep that.
LARGE, SMALL = 32, 16
# Four classes that Tiny-ImageNet and ImageNet-R have as well.
NUM_CLASSES = 4
_SIZES: dict[str, dict[str, Any]] = {
    "vit": {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "patch_size": PATCH_SIZE},
    "nac": {
        "hidden_size": 16,
        "code_size": 12,
        "signature_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "tokenizer_depths": [1, 1],
        "tokenizer_hidden_sizes": [4, 8],
        "position_embedding_size": 4,
        "num_input_latents": 4,
        "num_mediator_latents": 12,
        "num_output_latents": 3,
    },
}
_SIZES["deit"] = _SIZES["vit"]
_SIZES["vmoe"] = {**_SIZES["vit"], "num_experts": 4}
_SIZES["dinov2"] = {"hidden_size": 16, "num_attention_heads": 2, "mlp_ratio": 2, "patch_size": PATCH_SIZE}
# Arguments of a graph of 12 nodes that replace the recipe's; others are kept.
_GRAPHS = {
    "barabasi_albert": {"m": 2},
    "planted_partition": {"l": 3, "k": 4},
    "ring_of_cliques": {"num_cliques": 3, "clique_size": 4},
    "watts_strogatz": {"k": 4},
    "grid": {"dim": [3, 4]},
    "balanced_tree": {"r": 1, "h": 11},
    "barbell": {"m1": 6, "m2": 0},
}
# One epoch of one or two steps, on any machine.
_TRAINING = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "fp16": False,
}


def make_miniature(recipe: Recipe) -> Recipe:
    """
    Shrink a recipe: tiny networks with as many stages (and the recipe's kinds, graphs and losses), one epoch of one or
    two steps per phase, and a few generated images. Published sets get the folder layout of the originals, other
    sources become image folders; of the packaged digits, a few per class are used as they are. A published teacher is
    replaced by a tiny one that is trained. There is one seed, and no baselines of equal compute.

    The networks of the recipe itself are checked first, because the tiny ones always fit each other.

    Args:
        recipe (`Recipe`)

    Returns:
        `Recipe`: Its run goes to `<output_dir>-miniature/run`; the images are written to `<output_dir>-miniature`.

    Raises:
        `RecipeError`, `StageError` or `DataError`: the recipe itself could not run, see [`RecipeNetworks`].
    """
    RecipeNetworks(recipe, _class_names(recipe).__getitem__)
    folder = Path(f"{recipe.output_dir}-miniature")
    content = recipe.model_dump(mode="json")
    content |= {"name": f"{recipe.name} (miniature)", "output_dir": str(folder / "run"), "repeat_seeds": []}
    content |= {"processes": 1, "equal_compute": False}
    largest = max(config.image_size for config in recipe.data.values())
    for name, data in content["data"].items():
        data |= _source(name, data, folder)
        data["image_size"] = LARGE if data["image_size"] == largest else SMALL
    num_stages, teacher, meta = len(recipe.student.depths), content["teacher"], content["meta"] or {}
    if teacher["pretrained"] is not None:
        model = {"model_type": "vit", "preset": None, "config": {}}
        teacher |= {"pretrained": None, "probe": False, "model": model, "data": recipe.distill.data}
        if meta.get("model") is not None:
            # nothing else has to have the width of the published teacher
            meta["model"] = model
    # the first stage has more layers than the meta model's, so that alignment and distillation have something to do
    teacher["depths"] = [2, *[1] * (num_stages - 1)]
    content["student"]["depths"] = [1] * num_stages
    if meta:
        meta["depths"] = None
    for section, num_layers in ((meta, num_stages), (teacher, num_stages + 1), (content["student"], num_stages)):
        if section.get("model") is not None:
            section["model"] = _network(section["model"], num_layers)
    content["training"] |= _TRAINING
    trained = [(content, "training"), (teacher, "incubation"), (teacher, "finetuning")]
    trained += [(section, "training") for section in (meta, *map(content.get, ("distill", "finetune", "kd")))]
    trained += [(words, "training") for arm in content["arms"] if isinstance(arm, dict) for words in arm.values()]
    for section, key in trained:
        if key in section:
            section[key] = _short(section[key])
    return parse_recipe(content, f"the miniature of {recipe.name}")


def _class_names(recipe: Recipe) -> dict[str, list[str]]:
    """
    The classes of each training set. If images are not on this machine, all sets are assumed to have the teacher's
    classes.
    """
    sections = (recipe.meta, recipe.teacher, recipe.distill, recipe.finetune)
    data, names = RunData(recipe), {own.data for own in sections if own is not None and own.data is not None}
    names |= {recipe.data_of(arm) for arm in recipe.all_arms.values()}
    try:
        return {name: class_names_without_images(data, name) for name in sorted(names)}
    except DataError as error:
        Screen().say(f"The classes of the data sets are not checked: {error}")
    pretrained = recipe.teacher.pretrained
    stand_in = ["0", "1"] if pretrained is None else list(load_network_config(pretrained).id2label.values())
    return dict.fromkeys(names, stand_in)


def _network(spec: dict[str, Any], num_layers: int) -> dict[str, Any]:
    kind = spec["model_type"]
    presets = {"nac": NAC_PRESETS, "vmoe": VMOE_PRESETS}.get(kind, {})
    config = {**presets.get(spec["preset"], {}), **spec["config"], **_SIZES[kind]}
    # the image size comes from the data
    config.pop("image_size", None)
    # read-in and read-out of a NAC are stages as well
    config["num_hidden_layers"] = num_layers - 2 if kind == "nac" else num_layers
    if config.get("moe_layers"):
        config["moe_layers"] = [layer for layer in config["moe_layers"] if layer < num_layers]
    if config.get("graph_prior") is not None:
        config["graph_prior_kwargs"] = {**config["graph_prior_kwargs"], **_GRAPHS.get(config["graph_prior"], {})}
    if config.get("block_model_coef"):
        config["block_model_num_clusters"] = 3
    return {"model_type": kind, "preset": None, "config": config}


def _short(training: dict[str, Any]) -> dict[str, Any]:
    """Training arguments of a phase without those that make it long; a fraction of its steps stays a fraction."""
    kept = {name: value for name, value in training.items() if name not in {*_TRAINING, "max_steps"}}
    for name in ("eval_steps", "logging_steps", "save_steps", "warmup_steps"):
        if kept.get(name, 0) >= 1:
            kept[name] = 1
    return {**kept, **({name: _TRAINING[name] for name in training if name in _TRAINING})}


# ---- Images ----


def _source(name: str, data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write the images of a set, and return the recipe's values for them."""
    source = data["source"].partition(":")[0]
    if source in PACKAGED_SPLITS:
        return {"samples_per_class": IMAGES_PER_CLASS}
    few = {"samples_per_class": None, "max_corrupt_share": 0.0, "streaming": False}
    if source in WRITERS:
        WRITERS[source](folder / source, imagenet_classes("tiny", "r")[:NUM_CLASSES], IMAGES_PER_CLASS, _picture)
        return {**few, "source": f"{source}:{folder / source}", "partial": True}
    for number in range(NUM_CLASSES):
        for index in range(IMAGES_PER_CLASS):
            _picture(folder / name / f"class_{number}" / f"{index}.png", number)
    own = {"split": None, "holdout": 0.0, "config_name": None, "partial": False}
    return {**few, **own, "source": f"imagefolder:{folder / name}"}


def _picture(path: Path, number: int) -> None:
    """Write noise around the color of its class, of another size than the networks take."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 100, (36, 40, 3))
        Image.fromarray((noise + [40 * number, 70, 150 - 40 * number]).astype(np.uint8)).save(path)
