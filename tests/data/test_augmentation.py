import math

import numpy as np
import pytest
from PIL import Image

from m2mkd.data import random_affine, random_resized_crop_flip
from m2mkd.data.augmentation import CROP_AREA, IMAGENET_CROP_AREA, _random_box, color_jitter


class Fixed:
    """A generator whose `uniform` returns given numbers."""

    def __init__(self, values):
        self.values = values

    def uniform(self, low, high, size):
        assert (low, high, size) == (-1.0, 1.0, len(self.values))
        return np.array(self.values)


def dot(x: int, y: int, side: int = 41) -> Image.Image:
    array = np.zeros((side, side, 3), dtype=np.uint8)
    array[y - 1 : y + 2, x - 1 : x + 2] = 255
    return Image.fromarray(array)


def where(image: Image.Image) -> tuple[float, float]:
    ink = np.asarray(image)[:, :, 0].astype(float)
    y, x = np.mgrid[: ink.shape[0], : ink.shape[1]]
    return float((ink * x).sum() / ink.sum()), float((ink * y).sum() / ink.sum())


class TestRandomAffine:
    """A dot at (30, 20), ten pixels right of the centre (20, 20); draws are rotation, shear, scale, shift x, y."""

    @pytest.mark.parametrize(
        ("draws", "expected"),
        [
            ([0, 0, 0, 0, 0], (30, 20)),
            ([1, 0, 0, 0, 0], (20 + 10 * math.cos(math.radians(12)), 20 + 10 * math.sin(math.radians(12)))),
            ([0, 0, 1, 0, 0], (31.5, 20)),
            ([0, 0, -1, 0, 0], (28.5, 20)),
            ([0, 0, 0, 1, -0.5], (34.1, 17.95)),
        ],
    )
    def test_where_a_dot_goes(self, draws, expected):
        assert where(random_affine(dot(30, 20), Fixed(draws))) == pytest.approx(expected, abs=0.1)

    def test_shear_moves_rows(self):
        moved = where(random_affine(dot(20, 30), Fixed([0, 1, 0, 0, 0])))
        assert moved == pytest.approx((20 + 10 * math.tan(math.radians(8)), 30), abs=0.1)

    def test_identity_is_exact(self):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8))
        assert np.array_equal(np.asarray(random_affine(image, Fixed([0] * 5))), np.asarray(image))

    def test_mode_and_size_stay_and_chance_matters(self):
        image = dot(30, 20).convert("L").resize((30, 20))
        first, second = (random_affine(image, np.random.default_rng(seed)) for seed in (0, 1))
        assert first.size == (30, 20) and first.mode == "L"
        assert not np.array_equal(np.asarray(first), np.asarray(second))


class TestRandomResizedCropFlip:
    @pytest.mark.parametrize("size", [(40, 40), (61, 37), (3, 90), (500, 2), (1, 1)])
    def test_box_is_inside(self, size):
        rng = np.random.default_rng(0)
        for _ in range(200):
            left, top, right, bottom = _random_box(*size, rng, CROP_AREA)
            assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]

    @pytest.mark.parametrize("share", [CROP_AREA, IMAGENET_CROP_AREA])
    def test_area_and_ratio(self, share):
        rng = np.random.default_rng(0)
        boxes = np.array([_random_box(100, 100, rng, share) for _ in range(500)])
        width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        area = width * height / 100**2
        assert share[0] - 0.02 < area.min() < share[0] + 0.05 and 0.9 < area.max() <= 1
        assert 0.73 < (width / height).min() < 0.8 and 1.25 < (width / height).max() < 1.36

    def test_every_second_image_is_mirrored(self):
        ramp = Image.fromarray(np.tile(np.arange(50, dtype=np.uint8)[None, :, None], (50, 1, 3)))
        rng = np.random.default_rng(0)
        crops = [
            np.asarray(random_resized_crop_flip(ramp, 16, Image.Resampling.BICUBIC, rng)).astype(int)
            for _ in range(200)
        ]
        assert {crop.shape for crop in crops} == {(16, 16, 3)}
        assert 70 < sum(crop[0, 0, 0] > crop[0, -1, 0] for crop in crops) < 130

    def test_is_a_crop_and_then_a_resize(self):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 44, 3), dtype=np.uint8))
        out = random_resized_crop_flip(image, 16, Image.Resampling.BICUBIC, np.random.default_rng(1))
        rng = np.random.default_rng(1)
        crop = image.crop(_random_box(44, 30, rng, CROP_AREA)).resize((16, 16), Image.Resampling.BICUBIC)
        expected = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop
        assert np.array_equal(np.asarray(out), np.asarray(expected))


class TestColorJitter:
    def test_range_of_the_brightness(self):
        white = Image.new("RGB", (4, 4), (100, 100, 100))
        values = np.array(
            [np.asarray(color_jitter(white, 0.4, np.random.default_rng(seed)))[0, 0, 0] for seed in range(500)]
        )
        # contrast and saturation do nothing to a flat grey image
        assert 59 <= values.min() < 64 and 136 < values.max() <= 140 and abs(values.mean() - 100) < 3

    def test_nothing_at_zero(self):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
        out = color_jitter(image, 0.0, np.random.default_rng(0))
        assert np.array_equal(np.asarray(out), np.asarray(image))
