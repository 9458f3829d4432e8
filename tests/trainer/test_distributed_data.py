"""Two processes share a training set with repeats, and an evaluation."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from distributed_data import COUNT, grey_images
from testing_utils import vit

from m2mkd.data import RepeatedSampler
from m2mkd.evaluation.predict import predict


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("distributed")
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    run = subprocess.run(
        [*command, str(here / "distributed_data.py"), str(folder)],
        check=False, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]


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
