"""Two processes share a training set with repeats, and an evaluation."""

from collections import Counter

import pytest
from distributed_data import COUNT, grey_images, main
from testing_utils import in_two_processes, vit

from m2mkd.data import RepeatedSampler
from m2mkd.evaluation.predict import predict


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return in_two_processes(main, tmp_path_factory.mktemp("distributed"))


class TestRepeatedSampling:
    @pytest.mark.parametrize("epoch", ["0", "1"])
    def test_both_together_see_the_epoch_once(self, ranks, epoch):
        dataset = grey_images(train=True, repeated=3)
        dataset.set_epoch(int(epoch))
        expected = Counter(position for position, _ in RepeatedSampler(dataset, seed=42))
        seen = Counter(ranks[0]["seen"][epoch]) + Counter(ranks[1]["seen"][epoch])
        # accelerate fills up the last batches with images from the start
        assert not expected - seen and sum(seen.values()) == 24 and set(seen) == set(expected)
        assert len(ranks[0]["seen"][epoch]) == len(ranks[1]["seen"][epoch])

    def test_copies_fall_on_both(self, ranks):
        first, second = (set(rank["seen"]["0"]) for rank in ranks)
        assert len(first & second) >= 7  # of eight images

    def test_epochs_differ(self, ranks):
        assert set(ranks[0]["seen"]["0"]) != set(ranks[0]["seen"]["1"])


class TestStream:
    def test_training_sees_every_image(self, ranks):
        seen = Counter(ranks[0]["seen"]["stream"]) + Counter(ranks[1]["seen"]["stream"])
        assert set(seen) == set(range(COUNT)) and sum(seen.values()) == 24

    def test_evaluation_counts_each_image_once(self, ranks):
        single = predict(vit(), grey_images(train=False), batch_size=4, use_cpu=True)
        for rank in ranks:
            assert rank["stream"] == {"ranked": single.ranked.tolist(), "labels": single.labels.tolist()}


class TestEvaluation:
    def test_each_image_counts_once(self, ranks):
        single = predict(vit(), grey_images(train=False), batch_size=4, use_cpu=True)
        for rank in ranks:
            assert rank["labels"] == single.labels.tolist() and rank["n"] == COUNT
            assert rank["ranked"] == single.ranked.tolist()
            assert rank["loss"] == pytest.approx(single.summary()["loss"], rel=1e-5)
            assert rank["accuracy"] == single.summary()["accuracy"]
