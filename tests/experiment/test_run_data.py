"""Recipes whose images come from streams and from published sets, with the paper's augmentation."""

import json
from pathlib import Path

import datasets
import pytest
from published_sets import imagenet, renditions
from tiny_run import CLASS_NAMES, recipe_content, tiny_recipe

from m2mkd.data.imagenet_classes import imagenet_classes
from m2mkd.errors import DataError, RecipeError
from m2mkd.experiment import runner
from m2mkd.experiment.artifact import EVAL_RESULTS, read_results
from m2mkd.experiment.run_data import RunData, describe_set


WNIDS = imagenet_classes("tiny", "r")[:4]


def e2e_recipe(folder: Path, data: dict, **changes):
    """The end-to-end arm alone, on `train`; `data` is laid over the data sets of the tiny recipe."""
    content = recipe_content(folder)
    sets = {**content["data"], **data}
    finetune = {"data": "train", "training": {"num_train_epochs": 2, "eval_strategy": "epoch"}}
    return tiny_recipe(folder, data=sets, arms=["e2e"], finetune=finetune, processes=1, **changes)


@pytest.fixture
def streamed(monkeypatch):
    """Every set of the Hub is a stream of the training images of the tiny recipe."""

    def serve(folder: Path) -> None:
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASS_NAMES)})

        def generate(names):
            for name in names:
                for path in sorted((folder / "train" / name).glob("*.png")):
                    yield {"image": {"bytes": path.read_bytes(), "path": path.name}, "label": CLASS_NAMES.index(name)}

        stream = datasets.IterableDataset.from_generator(
            generate, features=features, gen_kwargs={"names": list(CLASS_NAMES)}
        )
        stream.info.splits = datasets.SplitDict({"train": datasets.SplitInfo("train", num_examples=24)})
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)

    return serve


class TestDescribe:
    def test_images_and_classes_of_each_set_that_is_used(self, tmp_path):
        recipe = e2e_recipe(tmp_path, {"unused": {"source": "imagefolder:nowhere"}})
        assert RunData(recipe).describe() == [
            "data.train: 24 images of 3 classes (blue, green, red)",
            "data.iid: 9 images of 3 classes (blue, green, red)",
            "data.ood: 6 images of 3 classes (blue, green, red)",
        ]

    def test_only_the_first_classes_are_named(self):
        assert describe_set("x", None, list("abcd")) == "data.x: an unknown number of images of 4 classes (a, b, c, …)"

    def test_a_run_starts_with_it(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(runner, "run_tasks", lambda *_: None)
        monkeypatch.setattr(runner, "make_report", lambda _: None)
        runner.run(tiny_recipe(tmp_path))
        said = capsys.readouterr().out
        assert said.startswith("data.train: 24 images") and "data.labelled: 12 images of 3 classes" in said


PIXELS = {"image_size": 8, "resample": "bilinear"}
STREAM = {"source": "someone/set", "split": "train", "streaming": True, **PIXELS}


class TestStream:
    @pytest.mark.parametrize("augmentation", ["affine", "imagenet"])
    def test_trains_and_tests_on_a_stream(self, tmp_path, streamed, augmentation):
        recipe = e2e_recipe(tmp_path, {"train": {**STREAM, "augmentation": augmentation}, "iid": STREAM})
        streamed(tmp_path)
        runner.run(recipe)
        results = read_results(tmp_path / "run" / "arms" / "e2e", EVAL_RESULTS)
        assert results["iid"]["n"] == 24
        trained = read_results(tmp_path / "run" / "arms" / "e2e")
        assert trained["train_samples_seen"] == 48 and trained["train_flops"] > 0

    def test_a_stream_that_cannot_be_had_names_the_set(self, tmp_path, monkeypatch):
        def load_dataset(*_, **__):
            raise ConnectionError("no network")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(DataError, match="data.train: datasets cannot stream"):
            RunData(e2e_recipe(tmp_path, {"train": STREAM})).check()


class TestPublishedSets:
    def test_shifted_set_is_tested_among_its_classes(self, tmp_path):
        copy = {"partial": True, **PIXELS, "center_crop": 0.8}
        root = imagenet(tmp_path / "imagenet", WNIDS, per_class=6)
        data = {
            "train": {"source": f"imagenet-1k:{root}", "split": "train", **copy, "augmentation": "imagenet"},
            "iid": {"source": f"imagenet-1k:{root}", "split": "val", **copy},
            "ood": {"source": f"imagenet-r:{renditions(tmp_path / 'r', WNIDS[1:3])}", **copy},
        }
        recipe = e2e_recipe(tmp_path, data)
        run_data = RunData(recipe)
        assert run_data.class_names("train") == WNIDS
        test_set = run_data.test_set("ood", "train", WNIDS)
        assert test_set.possible.tolist() == [1, 2] and test_set.config.center_crop == 0.8
        runner.run(recipe)
        results = read_results(tmp_path / "run" / "arms" / "e2e", EVAL_RESULTS)
        assert results["ood"]["n"] == 4 and results["ood"]["top5_accuracy"] == 1.0  # of two classes
        assert results["iid"]["n"] == 24


class TestUnlabelledImages:
    """A student learns from the teacher on images that have no labels."""

    @staticmethod
    def changes(folder: Path, **words) -> dict:
        content = recipe_content(folder)
        pixels = {"image_size": 8, "resample": "bilinear", "augmentation": "affine"}
        data = {**content["data"], "unlabelled": {"source": f"unlabeled:{folder / 'train'}", **pixels}}
        distill = {"data": "unlabelled", "context": "teacher", "match": "boundary", "training": {"alpha": 1.0}}
        return {
            "data": data,
            "distill": distill,
            "finetune": {"data": "unlabelled"},
            "kd": {"training": {"alpha": 1.0}},
            "arms": ["kd", "m2mkd_kd"],
            **words,
        }

    def test_a_run_reads_no_label(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        runner.run(tiny_recipe(tmp_path, **self.changes(tmp_path)))
        assert "data.unlabelled: 24 images without labels" in capsys.readouterr().out
        report = json.loads((tmp_path / "run" / "report.json").read_text())
        for name in ("kd", "m2mkd_kd"):
            assert report["arms"][name]["labels"] == 0 and report["arms"][name]["images"] == 24
            assert report["arms"][name]["iid"]["n"] == 9

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ({"kd": {}}, "`finetune.data` is 'unlabelled', a set without labels"),
            ({"arms": ["e2e"]}, "`finetune.data` is 'unlabelled', a set without labels"),
            ({"arms": [{"e2e": {"data": "unlabelled"}}]}, "`arms.e2e.data` is 'unlabelled', a set without labels"),
            ({"evaluation": {"iid": "unlabelled"}}, "`evaluation.iid` is 'unlabelled', a set without labels"),
        ],
    )
    def test_a_phase_that_reads_labels_is_refused(self, tmp_path: Path, words: dict, message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            tiny_recipe(tmp_path, **self.changes(tmp_path, **words))
