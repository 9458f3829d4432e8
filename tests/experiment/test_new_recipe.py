"""A recipe for one's own images, written by `m2mkd init`."""

import json
import re
from pathlib import Path

import pytest
from datasets import load_dataset
from testing_utils import vit
from tiny_run import CLASS_NAMES, published, write_images
from typer.testing import CliRunner

from m2mkd.cli import app
from m2mkd.errors import DataError, RecipeError
from m2mkd.experiment.new_recipe import look_at_images, write_new_recipe
from m2mkd.experiment.recipe_file import load_recipe
from m2mkd.experiment.run_data import RunData


def test_the_recipe_loads_and_says_why_and_what_it_costs(tmp_path: Path) -> None:
    images, ood = write_images(tmp_path / "own", per_class=10), write_images(tmp_path / "other", per_class=2)
    done = CliRunner().invoke(
        app, ["init", str(images), "--ood", str(ood), "--out", str(tmp_path / "r.yaml"), "--minutes", "600"]
    )
    assert done.exit_code == 0 and "24 training images, 3 classes, 8 pixels" in done.output
    text = (tmp_path / "r.yaml").read_text()
    data = RunData(load_recipe(tmp_path / "r.yaml"))
    assert {name: data.size(name)[0] for name in data.recipe.used_data()} == {"train": 24, "iid": 6, "ood": 6}
    assert data.recipe.data["train"].augmentation == "crop_flip"
    for cost in ("teacher", "pairs", "arm kd", "arm m2mkd_kd"):
        assert re.search(rf"^# {cost}: \d+ epochs of 24 images, .* about [\d.]+ minutes here$", text, re.MULTILINE)
    reasons = ("No teacher was given", "0.2 of each class", "4 layers of width 64", "initializer_range 0.1")
    assert all(reason in text for reason in reasons)


@pytest.mark.parametrize(
    ("labels", "is_probed"), [pytest.param(CLASS_NAMES, False, marks=pytest.mark.slow), (["cat", "dog"], True)]
)
def test_a_given_teacher_keeps_its_pixels_and_gets_a_probe_for_other_classes(
    labels: list[str], is_probed: bool, tmp_path: Path
) -> None:
    model = vit(num_hidden_layers=3, image_size=8, patch_size=4, num_labels=len(labels))
    model.config.id2label = dict(enumerate(labels))
    teacher = published(tmp_path / "teacher", model)
    images = write_images(tmp_path / "own", per_class=10)
    write_new_recipe(tmp_path / "r.yaml", str(images), None, None, str(teacher), minutes=600)
    recipe = load_recipe(tmp_path / "r.yaml")
    assert (recipe.teacher.probe, recipe.teacher.depths) == (is_probed, [1, 2])
    assert recipe.data["train"].image_size == 8 and recipe.student.model.config["patch_size"] == 4


def test_folders_of_splits_are_found(tmp_path: Path) -> None:
    for name, number in (("train", 4), ("val", 3), ("ood", 2)):
        write_images(tmp_path / name, per_class=number)
    images = look_at_images(str(tmp_path), None, None)
    assert {name: Path(own["source"]).name for name, own in images.sections.items()} == {
        "train": "train",
        "iid": "val",
        "ood": "ood",
    }


def test_a_folder_of_datasets_is_read(tmp_path: Path) -> None:
    for split in ("train", "test"):
        found = load_dataset("imagefolder", data_dir=str(write_images(tmp_path / "png")), split="train")
        found.to_parquet(tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet")
    images = look_at_images(str(tmp_path / "set"), None, None)
    assert images.train.class_names == CLASS_NAMES and images.sections["iid"]["split"] == "test"


def test_bad_input_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_images" / "cat").mkdir(parents=True)
    write_images(tmp_path / "one", class_names=["red"])
    for name in ("empty", "no_images", "one"):
        with pytest.raises(DataError, match=name):
            write_new_recipe(tmp_path / "r.yaml", str(tmp_path / name), None, None, None, minutes=1)
    (tmp_path / "r.yaml").touch()
    with pytest.raises(RecipeError, match="exists already"):
        write_new_recipe(tmp_path / "r.yaml", str(tmp_path / "one"), None, None, None, minutes=1)


@pytest.mark.slow
def test_init_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "PATH", per_class=20)
    for words in (["init", "PATH", "--out", "mine.yaml", "--minutes", "0.1"], ["run", "mine.yaml"]):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "runs/mine/report.json").read_text())
    assert {"kd", "m2mkd_kd"} <= {arm["arm"] for arm in report["arms"]}
