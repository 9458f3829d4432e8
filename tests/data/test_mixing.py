import numpy as np
import pytest
import torch
from scipy import stats

from m2mkd.data.mixing import draw_box, draw_mix, mix_batch, random_erasing


def ks_distance(values: list[float], alpha: float) -> float:
    """Largest distance between the distribution of the values and Beta(alpha, alpha)."""
    return float(stats.kstest(values, stats.beta(alpha, alpha).cdf).statistic)


class TestRandomErasing:
    def erased(self, count: int, size: int = 64) -> list[tuple[int, int]]:
        """Height and width of the boxes."""
        boxes = []
        for seed in range(count):
            image = random_erasing(torch.zeros(3, size, size), 1.0, np.random.default_rng(seed))
            touched = (image != 0).any(dim=0)
            rows, columns = touched.any(dim=1), touched.any(dim=0)
            assert touched.sum() == rows.sum() * columns.sum() > 0  # one full box
            boxes.append((int(rows.sum()), int(columns.sum())))
        return boxes

    def test_area_and_ratio(self):
        height, width = np.array(self.erased(1500)).T
        area, ratio = height * width / 64**2, np.log(height / width)
        assert 0.015 < area.min() < 0.03 and 0.31 < area.max() <= 0.345
        # uniform, but for the boxes that do not fit
        assert stats.kstest((area - 0.02) / (1 / 3 - 0.02), "uniform").statistic < 0.07
        assert np.exp(ratio.min()) == pytest.approx(0.3, abs=0.04) and np.exp(ratio.max()) == pytest.approx(
            3.33, abs=0.4
        )
        assert abs(ratio.mean()) < 0.06

    def test_chance(self):
        changed = [
            bool(random_erasing(torch.zeros(3, 16, 16), 0.25, np.random.default_rng(seed)).any())
            for seed in range(2000)
        ]
        assert np.mean(changed) == pytest.approx(0.25, abs=0.03)
        assert not random_erasing(torch.zeros(3, 16, 16), 0.0, np.random.default_rng(0)).any()

    def test_noise_differs_from_pixel_to_pixel(self):
        images = [random_erasing(torch.full((3, 64, 64), 9.0), 1.0, np.random.default_rng(seed)) for seed in range(40)]
        noise = torch.cat([image[image != 9.0] for image in images])
        assert noise.mean().abs() < 0.02 and noise.std() == pytest.approx(1.0, abs=0.02)
        assert len(noise.unique()) > 0.99 * len(noise)

    def test_the_rest_stays(self):
        image = torch.randn(3, 32, 32)
        erased = random_erasing(image.clone(), 1.0, np.random.default_rng(0))
        same = (erased == image).all(dim=0)
        assert 0.6 < same.float().mean() < 0.99


class TestLambda:
    def test_switching_and_distributions(self):
        drawn = [draw_mix(0.8, 1.0, np.random.default_rng(seed)) for seed in range(4000)]
        assert np.mean([is_cutmix for _, is_cutmix in drawn]) == pytest.approx(0.5, abs=0.03)
        assert ks_distance([weight for weight, is_cutmix in drawn if not is_cutmix], 0.8) < 0.04
        assert ks_distance([weight for weight, is_cutmix in drawn if is_cutmix], 1.0) < 0.04

    @pytest.mark.parametrize(("mixup", "cutmix", "alpha"), [(0.8, 0.0, 0.8), (0.2, 0.0, 0.2), (0.0, 1.0, 1.0)])
    def test_one_alone(self, mixup, cutmix, alpha):
        drawn = [draw_mix(mixup, cutmix, np.random.default_rng(seed)) for seed in range(2000)]
        assert {is_cutmix for _, is_cutmix in drawn} == {bool(cutmix)}
        assert ks_distance([weight for weight, _ in drawn], alpha) < 0.05


class TestBox:
    def test_is_inside_and_covers_the_share(self):
        rng = np.random.default_rng(0)
        for _ in range(300):
            weight = rng.uniform()
            top, bottom, left, right = draw_box(30, 44, weight, rng)
            assert 0 <= top <= bottom <= 30 and 0 <= left <= right <= 44
            assert (bottom - top) * (right - left) <= (1 - weight) * 30 * 44

    def test_whole_box_in_the_middle(self):
        class Middle:
            def integers(self, high):
                return high // 2

        assert draw_box(40, 60, 0.75, Middle()) == (10, 30, 15, 45)  # half of each side


class TestMixBatch:
    images = torch.randn(6, 3, 16, 16)
    labels = torch.tensor([0, 1, 2, 3, 4, 4])

    def mixed(self, mixup: float, cutmix: float, seed: int):
        before = self.images.clone()
        out = mix_batch(self.images, self.labels, 5, mixup, cutmix, np.random.default_rng(seed))
        assert torch.equal(self.images, before)
        return out

    def test_mixup(self):
        weight, _ = draw_mix(0.8, 0.0, np.random.default_rng(3))
        images, targets = self.mixed(0.8, 0.0, 3)
        assert torch.allclose(images[1], weight * self.images[1] + (1 - weight) * self.images[4], atol=1e-5)
        assert targets[1].tolist() == pytest.approx([0, weight, 0, 0, 1 - weight])
        assert targets[2].tolist() == pytest.approx([0, 0, weight, 1 - weight, 0])

    def test_cutmix_targets_are_the_area(self):
        for seed in range(30):
            images, targets = self.mixed(0.0, 1.0, seed)
            own = (images == self.images).all(dim=1).float().mean(dim=(1, 2))
            others = (images == self.images.flip(0)).all(dim=1).float().mean(dim=(1, 2))
            assert (own + others).tolist() == pytest.approx([1.0] * 6)
            assert targets[0, 0] == pytest.approx(own[0].item(), abs=1e-6)
            assert own.unique().numel() == 1  # one box for the batch

    def test_targets_are_distributions(self):
        for seed in range(20):
            _, targets = self.mixed(0.8, 1.0, seed)
            assert targets.dtype == torch.float32 and (targets >= 0).all()
            assert targets.sum(dim=1).tolist() == pytest.approx([1.0] * 6)

    def test_same_class_stays_whole(self):
        labels = torch.tensor([2, 2, 2, 2])
        _, targets = mix_batch(torch.randn(4, 3, 8, 8), labels, 3, 0.8, 1.0, np.random.default_rng(0))
        assert torch.allclose(targets, torch.tensor([[0.0, 0.0, 1.0]] * 4))

    def test_smoothing_before_or_after_the_mix_is_the_same(self):
        """The official code smooths both one-hot targets and mixes them; the loss smooths the mix."""
        weight, _ = draw_mix(0.8, 0.0, np.random.default_rng(3))
        one_hot = torch.nn.functional.one_hot(self.labels, 5) * 0.9 + 0.1 / 5
        official = one_hot * weight + one_hot.flip(0) * (1 - weight)
        _, targets = self.mixed(0.8, 0.0, 3)
        logits = torch.randn(6, 5)
        ours = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)
        assert ours.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, official).item(), abs=1e-6)

    def test_odd_and_single_batches(self):
        for count in (1, 5):
            images, targets = mix_batch(
                self.images[:count], self.labels[:count], 5, 0.8, 0.0, np.random.default_rng(0)
            )
            middle = count // 2
            assert torch.allclose(images[middle], self.images[middle], atol=1e-6)
            assert targets[middle, self.labels[middle]] == pytest.approx(1.0)
