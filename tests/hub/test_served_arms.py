"""A saved arm behind transformers' Auto classes and its image classification pipeline."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_run import CLASS_NAMES
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

from m2mkd import VMoEConfig, VMoEForImageClassification, VMoEModel


@pytest.fixture(scope="module", params=["e2e", "m2mkd"])
def arm(request: pytest.FixtureRequest, finished_run: Path) -> Path:
    return finished_run / "arms" / request.param


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Of different sizes and modes."""
    sizes = {"red": ("RGB", (8, 8)), "gray": ("L", (20, 11)), "blue": ("RGBA", (5, 9))}
    for name, (mode, size) in sizes.items():
        Image.new(mode, size, name).save(tmp_path / f"{name}.png")
    return [tmp_path / f"{name}.png" for name in sizes]


def test_the_auto_classes_find_ours(arm: Path) -> None:
    assert type(AutoConfig.from_pretrained(arm)) is VMoEConfig
    assert type(AutoModel.from_pretrained(arm)) is VMoEModel
    assert type(AutoModelForImageClassification.from_pretrained(arm)) is VMoEForImageClassification


def test_the_names_are_those_of_the_data(arm: Path) -> None:
    config = AutoConfig.from_pretrained(arm)
    assert config.id2label == dict(enumerate(CLASS_NAMES))
    assert config.label2id == {name: index for index, name in enumerate(CLASS_NAMES)}


def test_a_path_a_picture_and_a_batch_are_classified_alike(arm: Path, pictures: list[Path]) -> None:
    classify = pipeline("image-classification", model=str(arm))
    by_path = [classify(str(path)) for path in pictures]
    opened = [Image.open(path) for path in pictures]
    assert [classify(picture) for picture in opened] == by_path
    assert classify(opened) == classify([str(path) for path in pictures]) == by_path
    for one, batched in zip(by_path, classify(opened, batch_size=3), strict=True):
        assert [item["label"] for item in batched] == [item["label"] for item in one]
        assert [item["score"] for item in batched] == pytest.approx([item["score"] for item in one], abs=1e-5)
    for answer in by_path:
        assert sorted(item["label"] for item in answer) == CLASS_NAMES
        assert sum(item["score"] for item in answer) == pytest.approx(1)
    assert len(classify(opened[0], top_k=1)) == 1


def test_the_pipeline_says_what_model_and_processor_say(arm: Path, pictures: list[Path]) -> None:
    processor = AutoImageProcessor.from_pretrained(arm)
    model = AutoModelForImageClassification.from_pretrained(arm).eval()
    with torch.no_grad():
        logits = model(**processor(Image.open(pictures[0]).convert("RGB"), return_tensors="pt")).logits
    best = pipeline("image-classification", model=str(arm))(str(pictures[0]))[0]
    assert best["label"] == model.config.id2label[logits.argmax().item()]
    assert best["score"] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-5)
