"""Callbacks for the epoch of the data and the training time."""

import time
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from m2mkd.errors import RunError
from m2mkd.files import read_json, write_json


SECONDS_FILE = "seconds.json"


class DataEpoch(TrainerCallback):
    """
    Tells a data set the epoch, which its augmentation depends on. The data loader of accelerate does so in a single
    process, but not when it is sharded over several.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # in a run resumed at the end of an epoch, `state.epoch` is the next one already
        self.dataset.set_epoch(int(state.epoch or 0))


class Stopwatch(TrainerCallback):
    """Counts the seconds of training without evaluations. Checkpoints keep them, so a resumed run goes on counting."""

    def __init__(self, checkpoint: Path | None = None):
        self.seconds = 0.0
        if checkpoint is not None and (checkpoint / SECONDS_FILE).is_file():
            way_out = f"Delete {checkpoint} and run the same command again: it goes on from an earlier checkpoint."
            self.seconds = read_json(checkpoint / SECONDS_FILE, RunError, way_out)["seconds"]
        self._since: float | None = None

    def _stop(self) -> None:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
        self._since = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._since = time.perf_counter()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop()
        self.seconds -= kwargs.get("metrics", {}).get("eval_runtime", 0.0)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._stop()
        if args.should_save:
            write_json(
                Path(args.output_dir) / f"checkpoint-{state.global_step}" / SECONDS_FILE, {"seconds": self.seconds}
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop()
        self._since = None
