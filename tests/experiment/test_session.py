"""What the phases of a run share."""

import math
from pathlib import Path

import pytest
from tiny_run import tiny_recipe, write_images

from m2mkd.experiment.run_data import RunData
from m2mkd.experiment.session import Session, _without_clocks
from m2mkd.screen import Screen


def session(folder: Path, seed: int = 0, **changes) -> Session:
    recipe = tiny_recipe(folder, **changes)
    return Session(recipe, RunData(recipe), seed, Screen())


class TestArguments:
    def test_what_is_said_closest_to_the_phase_counts(self, tmp_path: Path) -> None:
        own = session(tmp_path, seed=3)
        args = own.arguments(tmp_path / "work", {"learning_rate": 5.0, "max_steps": 7}, {"max_steps": 1})
        # the recipe's for all phases, the phase's, and what the phase itself sets
        assert (args.per_device_train_batch_size, args.learning_rate, args.max_steps) == (6, 5.0, 1)
        assert args.save_strategy == "epoch" and args.seed == 3 and args.output_dir == str(tmp_path / "work")

    def test_workers_live_on_between_epochs(self, tmp_path: Path) -> None:
        own = session(tmp_path)
        assert own.arguments(tmp_path, {"dataloader_num_workers": 2}, {}).dataloader_persistent_workers
        assert not own.arguments(tmp_path, {"dataloader_num_workers": 0}, {}).dataloader_persistent_workers


class TestTestSets:
    @pytest.fixture
    def other_classes(self, tmp_path: Path) -> Session:
        """A recipe whose meta model and teacher are trained on other classes than the arms."""
        source = f"imagefolder:{write_images(tmp_path / 'others', class_names=['cat', 'dog', 'owl'])}"
        pixels = {"image_size": 8, "resample": "bilinear"}
        content = tiny_recipe(tmp_path).model_dump(mode="json")
        return session(tmp_path, data={**content["data"], "train": {"source": source, **pixels}})

    def test_a_set_of_other_classes_tests_the_arms_alone(self, other_classes: Session) -> None:
        assert other_classes.has_test_set("iid", "labelled") and not other_classes.has_test_set("iid", "train")

    def test_a_model_of_other_classes_has_no_results(self, other_classes: Session) -> None:
        assert set(other_classes.evaluate(None, "train").values()) == {None}


def test_the_log_has_no_clocks_and_nothing_that_is_not_finite() -> None:
    entry = {"epoch": 1.0, "loss": math.nan, "eval_loss": 2.0, "eval_runtime": 0.5, "eval_samples_per_second": 9.0}
    assert _without_clocks({**entry, "grad_norm": math.inf, "step": 3}) == {"epoch": 1.0, "eval_loss": 2.0, "step": 3}
