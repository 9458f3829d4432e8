import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, BitImageProcessorPil, ViTImageProcessorPil

from m2mkd.data import DataConfig, DataError, build_image_processor
from m2mkd.data.processing import PixelTransform, pixels_of_processor


@pytest.mark.parametrize("center_crop", [None, 0.875])
@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(28, 28), (50, 31), (9, 40)])
class TestParity:
    def test_bit_equal_to_the_saved_processor(self, tmp_path, resample, size, center_crop):
        normalization = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
        config = DataConfig(source="x", image_size=28, resample=resample, center_crop=center_crop, **normalization)
        build_image_processor(config).save_pretrained(tmp_path)
        processor = AutoImageProcessor.from_pretrained(tmp_path)
        array = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        image = Image.fromarray(array)
        ours = PixelTransform(config)(image)
        assert ours.dtype == torch.float32 and ours.shape == (3, 28, 28) and ours.is_contiguous()
        assert torch.equal(ours, build_image_processor(config)(image, return_tensors="pt")["pixel_values"][0])
        # With torchvision installed the reloaded processor may be another backend, with other rounding.
        if type(processor) is type(build_image_processor(config)):
            assert torch.equal(ours, processor(image, return_tensors="pt")["pixel_values"][0])


class TestBuildImageProcessor:
    def test_saved_under_the_common_name(self):
        saved = build_image_processor(DataConfig(source="x", image_size=33, resample="bilinear")).to_dict()
        assert saved["image_processor_type"] == "ViTImageProcessor"
        assert saved["size"] == {"height": 33, "width": 33} and saved["resample"] == 2

    def test_grey_images(self):
        config = DataConfig(source="x", image_size=8)
        grey = Image.new("L", (5, 5), 100)
        values = build_image_processor(config)(grey, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(values, PixelTransform(config)(grey.convert("RGB")))

    @pytest.mark.parametrize(("image_size", "short"), [(224, 256), (64, 73)])
    def test_sizes_of_the_paper(self, image_size, short):
        saved = build_image_processor(DataConfig(source="x", image_size=image_size, center_crop=0.875)).to_dict()
        assert saved["size"] == {"shortest_edge": short}
        assert saved["crop_size"] == {"height": image_size, "width": image_size} and saved["do_center_crop"]


class TestPixelsOfProcessor:
    @pytest.mark.parametrize("size", [{}, {"center_crop": 0.875}, {"image_size": 64, "center_crop": 0.875}])
    def test_back_and_forth(self, size):
        config = DataConfig(source="x", **{"image_size": 224, "mean": (0.1, 0.2, 0.3), "resample": "bilinear", **size})
        pixels = pixels_of_processor(build_image_processor(config), "it")
        again = build_image_processor(DataConfig(source="x", **pixels))
        assert again.to_dict() == build_image_processor(config).to_dict()

    def test_of_a_published_kind(self):
        processor = BitImageProcessorPil(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})
        pixels = pixels_of_processor(processor, "dinov2")
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 411, 3), dtype=np.uint8))
        ours = PixelTransform(DataConfig(source="x", **pixels))(image)
        assert torch.allclose(ours, processor(image, return_tensors="pt")["pixel_values"][0], atol=1e-6)

    @pytest.mark.parametrize(
        "wrong",
        [{"size": {"height": 8, "width": 9}}, {"resample": 0}, {"do_rescale": False}, {"size": {"shortest_edge": 8}}],
    )
    def test_refuses(self, wrong):
        with pytest.raises(DataError, match="the image processor of it resizes to"):
            pixels_of_processor(ViTImageProcessorPil(**wrong), "it")
