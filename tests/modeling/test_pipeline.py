from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from testing_utils import IMAGE_SIZE, NUM_LABELS, nac, vmoe
from transformers import AutoImageProcessor, ViTImageProcessorPil, pipeline


NAMES = [f"class {index}" for index in range(NUM_LABELS)]


def picture(seed: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 14, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture(params=[vmoe, nac], ids=["vmoe", "nac"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A classifier with its image processor and the names of its classes."""
    names = dict(enumerate(NAMES))
    model = request.param(id2label=names, label2id={name: index for index, name in names.items()})
    model.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(tmp_path)
    return tmp_path


class TestImageClassification:
    def test_a_path_an_image_and_a_batch(self, folder: Path) -> None:
        classify = pipeline("image-classification", model=str(folder))
        pictures = [picture(seed) for seed in range(5)]
        pictures[0].save(folder / "picture.png")
        single = classify(pictures[0], top_k=NUM_LABELS)
        assert {entry["label"] for entry in single} == set(NAMES)
        assert sum(entry["score"] for entry in single) == pytest.approx(1, abs=1e-5)
        assert classify(str(folder / "picture.png"), top_k=NUM_LABELS) == single
        batch = classify(pictures, top_k=NUM_LABELS, batch_size=2)
        assert len(batch) == 5
        for ours, expected in zip(batch[0], single, strict=True):
            assert ours["label"] == expected["label"] and ours["score"] == pytest.approx(expected["score"], abs=1e-5)

    @pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P"])
    def test_every_kind_of_image_is_made_rgb(self, folder: Path, mode: str) -> None:
        assert len(pipeline("image-classification", model=str(folder))(picture(0, mode), top_k=2)) == 2

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_precision(self, folder: Path, dtype: str) -> None:
        outputs = pipeline("image-classification", model=str(folder), dtype=dtype)(picture(0), top_k=NUM_LABELS)
        assert sum(entry["score"] for entry in outputs) == pytest.approx(1, abs=0.02)

    def test_features_of_the_body(self, folder: Path) -> None:
        features = pipeline("image-feature-extraction", model=str(folder))(picture(0))
        assert len(features) == 1 and len(features[0]) > 1

    def test_a_processor_that_names_no_class_is_that_of_vit(self, folder: Path) -> None:
        (folder / "preprocessor_config.json").write_text('{"size": {"height": 8, "width": 8}}')
        assert isinstance(AutoImageProcessor.from_pretrained(folder), ViTImageProcessorPil)
