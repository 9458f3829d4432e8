from collections import Counter
from io import BytesIO

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch.utils.data import DataLoader

from m2mkd.data import DataConfig, DataError
from m2mkd.data.imagenet_classes import imagenet_classes
from m2mkd.data.streaming import StreamedImages, open_stream


CLASSES = ["ant", "bee", "cat"]
SIDE = 6


def png(value: int) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (SIDE, SIDE), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def rows(values: list[int], broken: set[int], label) -> list[dict]:
    images = [png(value)[:40] if value in broken else png(value) for value in values]
    return [
        {"image": {"bytes": image, "path": f"{value}.png"}, "label": label(value)}
        for value, image in zip(values, images, strict=True)
    ]


@pytest.fixture
def hub(monkeypatch):
    """A Hub with one streamed split of `count` images in four files; image i is of grey i and class i mod 3."""

    def serve(count: int = 30, broken: set[int] = frozenset(), feature=None, label=None, says_length: bool = True):
        feature = feature or datasets.ClassLabel(names=CLASSES)
        features = datasets.Features({"image": datasets.Image(), "label": feature})
        # files of different length
        files = np.array_split(np.arange(count), [count // 2, count // 2 + 3, count - 4])
        label = label or (lambda value: value % 3)

        def generate(files):
            for file in files:
                yield from rows(file.tolist(), broken, label)

        stream = datasets.IterableDataset.from_generator(generate, features=features, gen_kwargs={"files": files})
        if says_length:
            stream.info.splits = datasets.SplitDict({"train": datasets.SplitInfo("train", num_examples=count)})
        asked = []

        def load_dataset(source, config_name, split, streaming):
            asked.append((source, split, streaming))
            return stream

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return serve


def config(**changes) -> DataConfig:
    return DataConfig(**{"source": "someone/set", "split": "train", "image_size": SIDE, "streaming": True, **changes})


def greys(dataset: StreamedImages, workers: int = 0, batch_size: int = 4) -> list[int]:
    """The grey of every image, in the order of the batches."""
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers)
    values = torch.cat([batch["pixel_values"] for batch in loader])[:, 0, 0, 0]
    return (((values + 1) / 2) * 255).round().int().tolist()


class TestEvaluation:
    @pytest.mark.parametrize("workers", [0, 2, 3])
    def test_every_row_once(self, hub, workers):
        hub(count=31)
        stream = open_stream(config(), train=False)
        assert len(stream) == 31 and sorted(greys(stream, workers)) == list(range(31))

    def test_labels(self, hub):
        asked = hub()
        samples = list(open_stream(config(), train=False))
        assert [sample["labels"] for sample in samples] == [index % 3 for index in range(30)]
        assert asked == [("someone/set", "train", True)]

    def test_relabel(self, hub):
        hub()
        stream = open_stream(config(), train=False).relabel(["dog", "cat", "bee", "ant"])
        assert [sample["labels"] for sample in stream][:3] == [3, 2, 1]
        assert stream.possible.tolist() == [1, 2, 3]
        assert open_stream(config(), train=False).relabel(CLASSES[::-1]).possible is None
        with pytest.raises(DataError, match="trained without 1 of the 3 classes of this stream, for example ant"):
            open_stream(config(), train=False).relabel(["bee", "cat"])


class TestTraining:
    @pytest.mark.parametrize("workers", [0, 2, 6])
    def test_an_epoch_has_its_length(self, hub, workers):
        hub()
        seen = greys(open_stream(config(), train=True), workers)
        assert len(seen) == 30 and set(seen) <= set(range(30)) and seen != sorted(seen)
        if not workers:  # with more, files of different length are made even
            assert len(set(seen)) == 30

    def test_seed_and_epoch(self, hub):
        hub()
        stream = open_stream(config(), train=True, seed=3)
        first = greys(stream)
        assert first == greys(open_stream(config(), train=True, seed=3)) != greys(open_stream(config(), train=True))
        stream.set_epoch(1)
        assert greys(stream) != first and greys(stream, workers=2) == greys(stream, workers=2)

    def test_augmentation_follows_the_image(self, hub):
        """The augmentation of an image depends on (seed, epoch, its bytes), not on its place in the stream."""
        hub()
        changes = {"augmentation": "affine", "random_erasing": 1.0}

        def by_grey(workers: int, epoch: int = 0) -> dict[float, torch.Tensor]:
            stream = open_stream(config(**changes), train=True)
            stream.set_epoch(epoch)
            loader = DataLoader(stream, batch_size=5, num_workers=workers)
            images = torch.cat([batch["pixel_values"] for batch in loader])
            return {image.mean().item(): image for image in images}

        straight, others = by_grey(0), by_grey(2)
        assert len(straight) == 30 and straight.keys() > others.keys() and len(others) > 10
        assert straight.keys() != by_grey(0, epoch=1).keys()

    def test_mixed(self, hub):
        hub()
        stream = open_stream(config(mixup=0.8), train=True)
        labels = torch.stack([sample["labels"] for sample in stream])
        assert labels.shape == (30, 3) and labels.sum(dim=1).tolist() == pytest.approx([1.0] * 30)
        again = torch.stack([sample["labels"] for sample in stream])
        assert torch.equal(labels, again)

    def test_repeated(self, hub):
        hub()
        counts = Counter(greys(open_stream(config(repeated=3), train=True)))
        assert len(counts) == 10 and set(counts.values()) == {3}


class TestCorrupt:
    def test_named_and_passed_over(self, hub, caplog):
        hub(broken={4})
        seen = greys(open_stream(config(max_corrupt_share=0.05), train=False))
        assert len(seen) == 29 and 4 not in seen and "4.png" in caplog.text

    def test_error(self, hub):
        hub(broken={4, 9})
        with pytest.raises(DataError, match="cannot decode the image someone/set:4.png"):
            list(open_stream(config(), train=False))
        with pytest.raises(DataError, match="9.png .*max_corrupt_share=0.05 allows no more corrupt images"):
            list(open_stream(config(max_corrupt_share=0.05), train=False))


class TestOpenStream:
    def test_published_set(self, hub):
        wnids = imagenet_classes("tiny")
        asked = hub(feature=datasets.ClassLabel(names=wnids[::-1]), label=lambda value: value)
        stream = open_stream(DataConfig(source="tiny-imagenet", split="val", streaming=True), train=False)
        assert asked == [("zh-plus/tiny-imagenet", "valid", True)] and len(stream) == 10_000
        assert stream.class_names == wnids and next(iter(stream))["labels"] == 199

    def test_class_names_as_text(self, hub):
        hub(feature=datasets.Value("string"), label=lambda value: CLASSES[value % 3])
        with pytest.raises(DataError, match="a stream needs a ClassLabel"):
            open_stream(config(), train=False)

    def test_unlabelled(self, hub):
        hub(label=lambda value: -1)
        with pytest.raises(DataError, match="has a row with label -1: use a labeled split"):
            list(open_stream(config(), train=False))

    def test_unknown_length(self, hub):
        hub(says_length=False)
        with pytest.raises(DataError, match="does not state the number of rows of split 'train'"):
            open_stream(config(), train=False)

    def test_column(self, hub):
        hub()
        with pytest.raises(DataError, match=r"no column 'img', its columns are \['image', 'label'\]"):
            open_stream(config(image_column="img"), train=False)

    def test_split(self):
        with pytest.raises(DataError, match="imagenet-1k has no split None"):
            open_stream(DataConfig(source="imagenet-1k", streaming=True), train=False)

    def test_a_part_of_another_set(self):
        with pytest.raises(DataError, match="tiny-imagenet-r is a part of another set and cannot be streamed"):
            open_stream(DataConfig(source="tiny-imagenet-r", streaming=True), train=False)

    def test_no_network(self, monkeypatch):
        def load_dataset(*args, **kwargs):
            raise ConnectionError("no network")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(DataError, match="datasets cannot stream source='someone/set'.*no network"):
            open_stream(config(), train=False)

    @pytest.mark.parametrize("wrong", [{"source": "mnist5k"}, {"source": "cifar10:x"}, {"samples_per_class": 3}])
    def test_refused(self, wrong):
        with pytest.raises(ValidationError):
            config(**wrong)
