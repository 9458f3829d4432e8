"""The clock of a training and the epochs of its data."""

import time
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from m2mkd.errors import RunError
from m2mkd.trainer.callbacks import SECONDS_FILE, DataEpoch, Stopwatch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its one value is what the clock says."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(str(folder), use_cpu=True)


class TestStopwatch:
    def test_evaluations_are_left_out_and_a_checkpoint_goes_on(self, tmp_path: Path, clock: list[float]) -> None:
        args, state, control = arguments(tmp_path), TrainerState(global_step=3), TrainerControl()
        checkpoint = tmp_path / "checkpoint-3"
        checkpoint.mkdir()
        watch = Stopwatch()
        watch.on_train_begin(args, state, control)
        clock[0] += 10
        watch.on_evaluate(args, state, control, metrics={"eval_runtime": 4.0})
        clock[0] += 5
        watch.on_save(args, state, control)
        clock[0] += 1
        watch.on_train_end(args, state, control)
        assert watch.seconds == 12.0
        # what came after the checkpoint is done once more
        again = Stopwatch(checkpoint)
        assert again.seconds == 11.0
        clock[0] += 1000
        again.on_train_begin(args, state, control)
        clock[0] += 2
        again.on_train_end(args, state, control)
        assert again.seconds == 13.0

    def test_a_checkpoint_without_a_clock_starts_at_zero(self, tmp_path: Path) -> None:
        assert Stopwatch(tmp_path).seconds == 0.0

    def test_a_damaged_one_is_named_with_the_folder_to_delete(self, tmp_path: Path) -> None:
        (tmp_path / SECONDS_FILE).write_text("{")
        with pytest.raises(RunError, match=rf"{SECONDS_FILE} is damaged .*Delete {tmp_path} and run the same command"):
            Stopwatch(tmp_path)


@pytest.mark.parametrize(("reached", "told"), [(None, 0), (0.0, 0), (2.0, 2), (2.9, 2)])
def test_data_are_told_the_epoch(tmp_path: Path, reached: float | None, told: int) -> None:
    class Epochs:
        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    data = Epochs()
    DataEpoch(data).on_epoch_begin(arguments(tmp_path), TrainerState(epoch=reached), TrainerControl())
    assert data.epoch == told
