import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from published_sets import picture, renditions, tiny_imagenet
from testing_utils import vit
from typer.testing import CliRunner

from m2mkd.cli import app
from m2mkd.data import DataConfig, DataError, ImageDataset, build_image_processor, load_images
from m2mkd.data.imagenet_classes import imagenet_classes
from m2mkd.evaluation.predict import evaluate_model
from m2mkd.evaluation.saved_model import class_names_of, data_config, evaluate_folder


SHARED = imagenet_classes("tiny", "r")[:3]
TINY = imagenet_classes("tiny")[:12]
PIXELS = {"image_size": 8, "mean": (0.4, 0.5, 0.6), "center_crop": 0.8}


def saved(folder: Path, class_names: list[str]) -> Path:
    model = vit(num_labels=len(class_names))
    model.config.id2label = dict(enumerate(class_names))
    model.save_pretrained(folder)
    build_image_processor(DataConfig(source="x", **PIXELS)).save_pretrained(folder)
    return folder


def logits_on(images: Path, folder_name: str) -> tuple[torch.Tensor, list[str]]:
    """Logits of the model, and the class folder of each image."""
    data = load_images(DataConfig(source=f"imagefolder:{images}"))
    dataset = ImageDataset(data, DataConfig(source="x", **PIXELS), train=False)
    pixels = torch.stack([sample["pixel_values"] for sample in dataset])
    with torch.no_grad():
        logits = vit(num_labels=len(TINY))(pixels).logits
    return logits, [data.class_names[label] for label in data.labels]


def colourful(root: Path, classes: list[str]) -> Path:
    for number, name in enumerate(classes):
        for index in range(3):
            picture(root / name / f"{index}.png", value=40 * number + 17 * index)
    return root


class TestEvaluateFolder:
    def test_whole_label_space(self, tmp_path):
        model, images = saved(tmp_path / "model", TINY), colourful(tmp_path / "images", TINY)
        source = f"imagefolder:{images}"
        result = evaluate_folder(model, [source], batch_size=5)[source]
        logits, names = logits_on(images, "images")
        labels = torch.tensor([TINY.index(name) for name in names])
        assert result["accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
        top5 = (logits.topk(5).indices == labels[:, None]).any(-1).float().mean().item()
        assert result["top5_accuracy"] == pytest.approx(top5)
        assert result["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
        assert (result["n"], result["classes"], result["left_out"]) == (36, 12, 0)
        means = [row["accuracy"] for row in result["per_class"].values()]
        assert np.mean(means) == pytest.approx(result["accuracy"]) and list(result["per_class"]) == TINY

    def test_shared_classes_alone(self, tmp_path):
        """Logits of other classes are left out, images of unknown ones too."""
        few = [*TINY[2:6], "n02999410"]
        model, images = saved(tmp_path / "model", TINY), colourful(tmp_path / "images", few)
        source = f"imagefolder:{images}"
        result = evaluate_folder(model, [source])[source]
        logits, names = logits_on(images, "images")
        known = [index for index, name in enumerate(names) if name in TINY]
        labels = torch.tensor([TINY[2:6].index(names[index]) for index in known])
        masked = logits[known, 2:6]
        assert result["accuracy"] == pytest.approx((masked.argmax(-1) == labels).float().mean().item())
        assert result["loss"] == pytest.approx(F.cross_entropy(masked, labels).item(), rel=1e-5)
        assert result["top5_accuracy"] == 1.0  # of four classes
        assert (result["n"], result["classes"], result["left_out"]) == (12, 4, 3)
        assert list(result["per_class"]) == TINY[2:6]

    def test_published_sets(self, tmp_path):
        model = saved(tmp_path / "model", imagenet_classes("tiny"))
        iid = f"tiny-imagenet:{tiny_imagenet(tmp_path / 'tiny', SHARED)}"
        ood = f"tiny-imagenet-r:{renditions(tmp_path / 'r', SHARED)}"
        results = evaluate_folder(model, [iid, ood], partial=True, iid_accuracy=0.6, baselines=[(0.6, 0.2)])
        assert list(results) == [iid, ood] and results[ood]["classes"] == 3 and results[iid]["n"] == 6
        assert results[ood]["accuracy_gap"] == pytest.approx(results[ood]["accuracy"] - 0.6)

    def test_robustness_needs_accuracies_inside(self, tmp_path):
        model = saved(tmp_path / "model", TINY)
        source = f"imagefolder:{colourful(tmp_path / 'images', TINY[:1])}"
        with pytest.raises(DataError, match="between 0 and 1"):
            evaluate_folder(model, [source], iid_accuracy=1.0, baselines=[(0.6, 0.2)])

    def test_nothing_shared(self, tmp_path):
        model = saved(tmp_path / "model", TINY)
        source = f"imagefolder:{colourful(tmp_path / 'images', ['ant', 'bee'])}"
        with pytest.raises(DataError, match="the model knows none of the classes of imagefolder.*ant, bee"):
            evaluate_folder(model, [source])

    def test_no_processor(self, tmp_path):
        vit(num_labels=3).save_pretrained(tmp_path)
        with pytest.raises(DataError, match="has no image processor"):
            evaluate_folder(tmp_path, ["uci_digits"])


class TestClassNames:
    def test_words_are_taken_in_their_usual_order(self):
        model = vit(num_labels=200)
        assert class_names_of(model, "tiny-imagenet-r:x") == imagenet_classes("tiny")
        assert class_names_of(model, "cub-200:x")[0] == "LABEL_0"
        assert class_names_of(vit(num_labels=7), "imagenet-r")[0] == "LABEL_0"


class TestDataConfig:
    @pytest.mark.parametrize(
        ("source", "split"),
        [("imagenet-1k:x", "val"), ("tiny-imagenet", "val"), ("cifar100", "test"), ("imagenet-r", "test")],
    )
    def test_test_splits(self, source, split):
        assert data_config(source, PIXELS).split == split

    def test_refused_source(self):
        with pytest.raises(DataError, match="unknown name before the colon: use imagefolder or one of"):
            data_config("tinyimagenet:x", PIXELS)


class TestEvaluateModel:
    def test_a_model_that_diverged_is_never_right(self, tmp_path):
        model = vit(num_labels=3)
        torch.nn.init.constant_(model.classifier.bias, math.nan)
        data = load_images(DataConfig(source=f"imagefolder:{colourful(tmp_path, ['a', 'b', 'c'])}"))
        dataset = ImageDataset(data, DataConfig(source="x", **PIXELS), train=False)
        assert evaluate_model(model, dataset, 4, use_cpu=True)["accuracy"] == 0.0


class TestCommand:
    def run(self, *arguments: str):
        return CliRunner().invoke(app, ["evaluate", *arguments])

    def test_table_and_json(self, tmp_path):
        model = saved(tmp_path / "model", TINY)
        source = f"imagefolder:{colourful(tmp_path / 'images', TINY)}"
        table = self.run(str(model), "--data", source, "--per-class")
        assert table.exit_code == 0, table.output
        assert "top-5 %" in table.output and TINY[3] in table.output
        plain = self.run(str(model), "--data", source, "--json")
        result = json.loads(plain.stdout)[source]
        assert plain.stderr == f"Evaluating {model} on {source}: 36 images\n"
        assert result["n"] == 36 and set(result["per_class"]) == set(TINY)

    @pytest.mark.parametrize("command", ["evaluate", "few-shot"])
    @pytest.mark.parametrize(
        ("made", "message"),
        [
            ([], "There is no folder {folder}, and it is not a valid Hub id (name or user/name). Check the path."),
            (["x"], "There is no model in the folder {folder}: it has no config.json. Give a folder that save_pretr"),
            (["arms/kd/config.json"], "Give one of this run's models: {folder}/arms/kd."),
        ],
    )
    def test_no_model(self, tmp_path, command, made, message):
        folder = tmp_path / "run"
        for name in made:
            (folder / name).parent.mkdir(parents=True)
            (folder / name).touch()
        done = CliRunner().invoke(app, [command, str(folder), "--data", "mnist5k"])
        assert done.exit_code == 1 and message.format(folder=folder) in done.stderr

    def test_an_id_that_the_hub_does_not_have(self):
        done = self.run("runs/none", "--data", "mnist5k")
        assert "There is no folder runs/none, and the model cannot be loaded from the Hub: " in done.stderr

    def test_error(self, tmp_path):
        done = self.run(str(saved(tmp_path / "model", TINY)), "--data", "cifar10:nowhere")
        assert done.exit_code == 1 and "Traceback" not in done.output

    def test_baseline(self, tmp_path):
        assert self.run(str(tmp_path), "--data", "x", "--baseline", "high").exit_code != 0
