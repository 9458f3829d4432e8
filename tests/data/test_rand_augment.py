import numpy as np
import pytest
from PIL import Image

from m2mkd.data.rand_augment import OPERATIONS, draw_operations, rand_augment


BICUBIC = Image.Resampling.BICUBIC
GREY = (124, 116, 104)


def noise(height: int = 24, width: int = 31) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def apply(name: str, share: float, sign: int = 1, pixels: np.ndarray | None = None) -> np.ndarray:
    image = Image.fromarray(noise() if pixels is None else pixels)
    return np.asarray(OPERATIONS[name](image, share, sign, BICUBIC, GREY))


class TestDraws:
    """m9-mstd0.5: of 15 operations two, each with chance 1/2, at a magnitude from N(9, 0.5) cut at 10."""

    drawn = [draw_operations(np.random.default_rng(seed)) for seed in range(6000)]

    def test_how_many(self):
        counts = np.bincount([len(operations) for operations in self.drawn], minlength=3) / len(self.drawn)
        assert counts == pytest.approx([1 / 4, 1 / 2, 1 / 4], abs=0.025)

    def test_each_operation_equally_often(self):
        names = [name for operations in self.drawn for name, _, _ in operations]
        share = [names.count(name) / len(names) for name in OPERATIONS]
        assert len(OPERATIONS) == 15 and share == pytest.approx([1 / 15] * 15, abs=0.012)

    def test_twice_the_same_happens(self):
        pairs = [operations for operations in self.drawn if len(operations) == 2]
        assert np.mean([first[0] == second[0] for first, second in pairs]) == pytest.approx(1 / 15, abs=0.025)

    def test_magnitude(self):
        magnitude = np.array([10 * share for operations in self.drawn for _, share, _ in operations])
        assert magnitude.mean() == pytest.approx(9, abs=0.03) and magnitude.std() == pytest.approx(0.5, abs=0.03)
        # P(N(9, 0.5) > 10), all of it at 10 exactly
        assert np.mean(magnitude == 10) == pytest.approx(0.0228, abs=0.008) and magnitude.max() == 10

    def test_sign(self):
        signs = [sign for operations in self.drawn for _, _, sign in operations]
        assert set(signs) == {-1, 1} and abs(np.mean(signs)) < 0.05

    def test_every_image_has_its_own(self):
        assert len({str(operations) for operations in self.drawn}) > 4000


class TestOperations:
    def test_point_operations(self):
        pixels = noise().astype(int)
        assert np.array_equal(apply("invert", 0.9), 255 - pixels)
        assert np.array_equal(apply("posterize", 0.9), pixels // 128 * 128)
        assert np.array_equal(apply("solarize", 0.9), np.where(pixels < 256 - 230, pixels, 255 - pixels))
        assert np.array_equal(apply("solarize_add", 0.9), np.where(pixels < 128, np.minimum(pixels + 99, 255), pixels))

    def test_the_largest_magnitude(self):
        assert not apply("posterize", 1.0).any()
        assert np.array_equal(apply("solarize", 1.0), 255 - noise())

    @pytest.mark.parametrize("name", ["color", "contrast", "brightness", "sharpness"])
    def test_enhancements_change_nothing_at_zero_and_more_with_the_magnitude(self, name):
        def changed(share: float, sign: int) -> float:
            return float(np.abs(apply(name, share, sign).astype(int) - noise()).mean())

        for sign in (1, -1):
            assert changed(0.0, sign) == 0 < changed(0.5, sign) < changed(1.0, sign)

    def test_brightness(self):
        expected = np.minimum(noise().astype(float) * 0.19, 255)
        assert np.abs(apply("brightness", 0.9, -1) - expected).max() <= 1

    @pytest.mark.parametrize(("name", "axis"), [("translate_x", 1), ("translate_y", 0)])
    @pytest.mark.parametrize("sign", [1, -1])
    def test_translations(self, name, axis, sign):
        pixels = noise(20, 20)
        moved = apply(name, 1.0, sign, pixels)  # 0.45 of 20 pixels
        expected = np.roll(pixels, -9 * sign, axis=axis)
        gone = [slice(None), slice(None)]
        gone[axis] = slice(-9, None) if sign > 0 else slice(0, 9)
        expected[tuple(gone)] = GREY
        assert np.array_equal(moved, expected)

    def test_rotation_and_shear_move_a_dot(self):
        pixels = np.zeros((41, 41, 3), dtype=np.uint8)
        pixels[19:22, 29:32] = 255  # ten pixels right of the centre

        def where(name: str, share: float, sign: int) -> tuple[float, float]:
            image = Image.fromarray(pixels)
            ink = np.asarray(OPERATIONS[name](image, share, sign, BICUBIC, (0, 0, 0)))[:, :, 0].astype(float)
            y, x = np.mgrid[:41, :41]
            return float((ink * x).sum() / ink.sum()), float((ink * y).sum() / ink.sum())

        # Pillow turns anticlockwise, and the affine maps are those of the result into the image
        assert where("rotate", 1.0, 1) == pytest.approx((20 + 8.66, 20 - 5), abs=0.3)
        assert where("rotate", 1.0, -1) == pytest.approx((20 + 8.66, 20 + 5), abs=0.3)
        assert where("shear_x", 1.0, 1) == pytest.approx((30 - 0.3 * 20.5, 20), abs=0.3)
        assert where("shear_y", 1.0, -1) == pytest.approx((30, 20 + 0.3 * 30.5), abs=0.3)

    def test_contrast_of_a_flat_image(self):
        flat = np.full((6, 6, 3), 100, dtype=np.uint8)
        for name in ("auto_contrast", "equalize", "contrast", "color", "sharpness"):
            assert np.array_equal(apply(name, 0.9, pixels=flat), flat)


class TestRandAugment:
    def test_mode_and_size_stay(self):
        image = Image.fromarray(noise())
        for seed in range(60):
            out = rand_augment(image, BICUBIC, GREY, np.random.default_rng(seed))
            assert out.size == image.size and out.mode == "RGB"

    def test_the_operations_that_were_drawn(self):
        image = Image.fromarray(noise())
        for seed in range(40):
            expected = image
            for name, share, sign in draw_operations(np.random.default_rng(seed)):
                expected = OPERATIONS[name](expected, share, sign, BICUBIC, GREY)
            out = rand_augment(image, BICUBIC, GREY, np.random.default_rng(seed))
            assert np.array_equal(np.asarray(out), np.asarray(expected))
