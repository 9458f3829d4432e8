"""Progress display of a training."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from m2mkd.screen import Screen


class ShownProgress(TrainerCallback):
    """
    Shows the progress of a phase on a screen, with the latest loss and accuracy. Evaluations take only seconds and are
    not shown.
    """

    def __init__(self, name: str, screen: Screen):
        self.name, self.screen = name, screen
        self._shown: dict[str, str] = {}

    def _advance(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            self.screen.advance(self.name, state.global_step, state.max_steps, self._shown)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._advance(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._advance(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        accuracies = [value for name, value in logs.items() if name.endswith("accuracy")]
        self._shown = {"loss": f"{logs['loss']:.3f}"}
        if accuracies:
            self._shown["accuracy"] = f"{sum(accuracies) / len(accuracies):.3f}"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.screen.finish(self.name)
