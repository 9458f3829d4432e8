import numpy as np
import pytest

from m2mkd.data import DataError, LabeledImages
from m2mkd.data.episodes import draw_episodes


def labelled(per_class: list[int], prefix: str = "train") -> LabeledImages:
    labels = np.repeat(np.arange(len(per_class), dtype=np.int64), per_class)
    labels = np.random.default_rng(0).permutation(labels)
    names = [f"{prefix}[{index}]" for index in range(len(labels))]
    return LabeledImages([None] * len(labels), labels, [f"c{index}" for index in range(len(per_class))], names)


TRAIN, TEST = labelled([20] * 10), labelled([30] * 10, "test")


class TestDrawEpisodes:
    @pytest.mark.parametrize("two_sets", [True, False])
    def test_shapes_classes_and_no_leak(self, two_sets):
        validation = TEST if two_sets else None
        for episode in draw_episodes(TRAIN, validation, ways=8, shots=5, episodes=30, seed=1):
            pool = TEST if two_sets else TRAIN
            assert len(set(episode.classes)) == 8
            assert np.bincount(TRAIN.labels[episode.train], minlength=10)[episode.classes].tolist() == [5] * 8
            assert np.bincount(pool.labels[episode.validation], minlength=10)[episode.classes].tolist() == [15] * 8
            assert len(set(episode.train)) == 40 and len(set(episode.validation)) == 120
            learnt = {TRAIN.names[index] for index in episode.train}
            assert learnt.isdisjoint(pool.names[index] for index in episode.validation)
            # the task's own labels
            assert np.array_equal(episode.classes[episode.own_labels(episode.train)], TRAIN.labels[episode.train])
            assert np.array_equal(
                episode.classes[episode.own_labels(episode.validation)], pool.labels[episode.validation]
            )

    def test_every_class_and_image_has_its_turn(self):
        episodes = list(draw_episodes(TRAIN, None, ways=5, shots=2, episodes=200, seed=0))
        counts = np.bincount(np.concatenate([episode.classes for episode in episodes]), minlength=10)
        assert counts.sum() == 1000 and counts.min() > 70 and counts.max() < 130
        assert len(set(np.concatenate([episode.train for episode in episodes]))) == len(TRAIN)

    def test_seed_and_number(self):
        def drawn(seed: int, episodes: int = 2) -> list[list[int]]:
            found = draw_episodes(TRAIN, TEST, ways=3, shots=1, episodes=episodes, seed=seed)
            return [[*episode.train, *episode.validation] for episode in found]

        first, second = drawn(0)
        assert drawn(0, 5)[:2] == [first, second] != drawn(1) and first != second

    def test_classes_with_too_few_images_are_passed_over(self):
        data = labelled([20, 3, 20, 20])
        episodes = list(draw_episodes(data, None, ways=3, shots=1, episodes=9, seed=0))
        assert all(1 not in episode.classes for episode in episodes)

    @pytest.mark.parametrize(("validation", "shots", "most"), [(None, 6, 5), (TEST, 11, 10)])
    def test_too_few(self, validation, shots, most):
        rule = f"shots is {shots}, so each class .* {shots} images to learn from and {3 * shots} others to test on"
        with pytest.raises(
            DataError, match=f"{rule}. 0 of 10 classes have as many, but ways is 8: set shots to {most} or fewer$"
        ):
            list(draw_episodes(TRAIN, validation, ways=8, shots=shots, episodes=1, seed=0))
        assert len(list(draw_episodes(TRAIN, validation, ways=8, shots=most, episodes=1, seed=0))) == 1

    @pytest.mark.parametrize(
        ("ways", "shots", "way_out"),
        [
            (3, 2, "2 of 4 .*: set shots to 1 or fewer or set ways to 2 or fewer$"),
            (4, 1, "3 of 4 classes have as many, but ways is 4: set ways to 3 or fewer$"),
            (5, 1, "ways is 5, but there are only 4 classes: set ways to 4 or fewer$"),
            (4, 9, "0 of 4 classes have as many, but ways is 4: add images$"),
        ],
    )
    def test_the_way_out_works(self, ways, shots, way_out):
        with pytest.raises(DataError, match=way_out):
            list(draw_episodes(labelled([8, 2, 8, 4]), None, ways=ways, shots=shots, episodes=1, seed=0))

    def test_sets_that_share_images(self):
        with pytest.raises(DataError, match=r"200 images are in both sets, for example train\[0\]"):
            list(draw_episodes(TRAIN, labelled([20] * 10), ways=2, shots=1, episodes=1, seed=0))

    def test_sets_of_other_classes(self):
        with pytest.raises(DataError, match="have different classes"):
            list(draw_episodes(TRAIN, labelled([20] * 9, "test"), ways=2, shots=1, episodes=1, seed=0))
