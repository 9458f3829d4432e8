"""What test_distributed_data.py starts in two processes; each writes what it saw to `rank_<i>.json`."""

import json
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from testing_utils import NUM_LABELS, distillation_trainer, vit

from m2mkd.data import DataConfig, ImageDataset, LabeledImages
from m2mkd.data.streaming import StreamedImages
from m2mkd.evaluation.predict import predict


COUNT = 23  # does not divide by two processes times any batch size


def grey_images(train: bool, **changes) -> ImageDataset:
    """Image i is of grey 10 i; its label is i modulo 5."""
    pictures = [Image.new("RGB", (8, 8), (10 * index,) * 3) for index in range(COUNT)]
    labels = np.arange(COUNT, dtype=np.int64) % NUM_LABELS
    data = LabeledImages(pictures, labels, list("abcde"), [str(index) for index in range(COUNT)])
    return ImageDataset(data, DataConfig(source="x", image_size=8, **changes), train=train)


def streamed(train: bool) -> StreamedImages:
    """The same images from a stream of two files."""

    def generate(files):
        for file in files:
            for index in file:
                buffer = BytesIO()
                Image.new("RGB", (8, 8), (10 * index,) * 3).save(buffer, "PNG")
                image = {"bytes": buffer.getvalue(), "path": None}
                yield {"image": image, "label": index % NUM_LABELS}

    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    files = {"files": [list(range(10)), list(range(10, COUNT))]}
    rows = datasets.IterableDataset.from_generator(generate, features=features, gen_kwargs=files)
    config = DataConfig(source="x", image_size=8, streaming=True)
    return StreamedImages(rows, COUNT, {index: index for index in range(NUM_LABELS)}, list("abcde"), config, train)


def greys(batches) -> list[int]:
    """Which images a pass over the loader gives."""
    values = torch.cat([batch["pixel_values"][:, 0, 0, 0] for batch in batches])
    return ((values + 1) / 2 * 255 / 10).round().int().tolist()


def main(folder: Path) -> None:
    dataset = grey_images(train=True, repeated=3)
    trainer = distillation_trainer(folder / "run", train_dataset=dataset, ddp_backend="gloo")
    rank = trainer.args.process_index
    seen = {}
    for epoch in (0, 1):
        loader = trainer.get_train_dataloader()
        loader.set_epoch(epoch)  # as the Trainer does
        seen[epoch] = greys(loader)
    predictions = predict(vit(), grey_images(train=False), batch_size=4, use_cpu=True)
    stream = distillation_trainer(folder / "stream", train_dataset=streamed(train=True), ddp_backend="gloo")
    seen["stream"] = greys(stream.get_train_dataloader())
    of_stream = predict(vit(), streamed(train=False), batch_size=4, use_cpu=True)
    report = {
        "seen": seen,
        "ranked": predictions.ranked.tolist(),
        "labels": predictions.labels.tolist(),
        "stream": {"ranked": of_stream.ranked.tolist(), "labels": of_stream.labels.tolist()},
    }
    report |= predictions.summary()
    (folder / f"rank_{rank}.json").write_text(json.dumps(report))
