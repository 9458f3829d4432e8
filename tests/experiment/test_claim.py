"""Which keys of a recipe may still change in a folder depends on what is finished there."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tiny_run import recipe_content
from transformers import TrainingArguments

from m2mkd.errors import RunError
from m2mkd.experiment import dependence
from m2mkd.experiment.artifact import TRAIN_RESULTS, read_noted_recipe
from m2mkd.experiment.claim import claim_folder, known_arms
from m2mkd.experiment.recipe import Recipe
from m2mkd.experiment.recipe_file import parse_recipe
from m2mkd.experiment.run_folder import RunFolder
from m2mkd.files import write_json


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """A tiny recipe whose meta model and teacher are finished and whose pairs are on their way."""
    content = recipe_content(tmp_path)
    run = Path(content["output_dir"])
    for phase in ("meta", "teacher"):
        (run / phase).mkdir(parents=True)
        write_json(run / phase / TRAIN_RESULTS, {})
    (run / "pairs" / ".work-0-1.work" / "checkpoint-4").mkdir(parents=True)
    claim(content)
    return content


def claim(content: dict[str, Any]) -> Recipe:
    recipe = parse_recipe(content, "a recipe")
    claim_folder(recipe)
    return recipe


def checkpoints(content: dict[str, Any]) -> list[Path]:
    return list(Path(content["output_dir"]).rglob("checkpoint-*"))


class TestClaimFolder:
    def test_damaged_results_are_to_be_deleted_and_made_again(self, content: dict[str, Any]) -> None:
        arm = Path(content["output_dir"]) / "arms" / "mine"
        arm.mkdir(parents=True)
        (arm / TRAIN_RESULTS).write_text("[]")
        with pytest.raises(RunError, match=rf"{TRAIN_RESULTS} is damaged .*Delete {arm} and run the recipe again:"):
            known_arms(RunFolder(content["output_dir"], 0), parse_recipe(content, "a recipe"), 0)

    def test_the_recipe_is_noted(self, content: dict[str, Any]) -> None:
        assert read_noted_recipe(Path(content["output_dir"]))["name"] == "tiny"

    @pytest.mark.parametrize(
        "section, key, value, finished",
        [
            ("training", "learning_rate", 0.5, "meta, teacher"),
            ("meta", "data", "labelled", "meta, teacher"),
            ("teacher", "incubation", {"num_train_epochs": 9}, "teacher"),
            ("evaluation", "ood", None, "meta, teacher"),
        ],
    )
    def test_what_a_finished_phase_depends_on_is_refused_and_the_phases_are_named(
        self, content: dict[str, Any], section: str, key: str, value: Any, finished: str
    ) -> None:
        content[section][key] = value
        with pytest.raises(RunError, match=rf"{section}.{key}.*→ .*\({finished}\)"):
            claim(content)

    def test_data_of_a_finished_phase_are_refused(self, content: dict[str, Any]) -> None:
        content["data"]["train"]["augmentation"] = "none"
        with pytest.raises(RunError, match=r"data.train.augmentation: affine → none \(meta, teacher\)"):
            claim(content)

    @pytest.mark.parametrize(
        "section, place", [("training", ()), ("meta", ("training",)), ("teacher", ("incubation",))]
    )
    def test_how_a_run_is_done_may_change_after_it(
        self, content: dict[str, Any], section: str, place: tuple[str, ...]
    ) -> None:
        training = content[section] if not place else content[section].setdefault(*place, {})
        settings = {"dataloader_num_workers": 2, "report_to": "tensorboard", "logging_steps": 0.5, "save_steps": 3}
        training.update({**settings, "save_total_limit": 1, "disable_tqdm": True, "run_name": "again"})
        claim(content)
        assert checkpoints(content)

    @pytest.mark.parametrize(
        "training", [{"dataloader_in_order": False}, {"save_steps": 3, "load_best_model_at_end": True}]
    )
    def test_what_changes_the_weights_may_not(self, content: dict[str, Any], training: dict[str, Any]) -> None:
        content["training"].update(training)
        with pytest.raises(RunError, match=r"training\.\w+: None → .*\(meta, teacher\)"):
            claim(content)

    def test_every_argument_that_may_change_is_one(self) -> None:
        assert set(dependence._OPERATIONAL | dependence._CHECKPOINTS) < {own.name for own in fields(TrainingArguments)}

    def test_the_advice_keeps_what_is_finished(self, content: dict[str, Any]) -> None:
        content["training"]["learning_rate"] = 0.5
        with pytest.raises(RunError, match=r"set the old values again.*another --output_dir") as caught:
            claim(content)
        assert "--finetune.training.learning_rate" in str(caught.value)

    def test_training_arguments_of_a_phase_on_its_way_may_change_and_its_checkpoint_stays(
        self, content: dict[str, Any]
    ) -> None:
        content["distill"]["training"]["learning_rate"] = 1e-4
        claim(content)
        assert checkpoints(content)
        note = read_noted_recipe(Path(content["output_dir"]))
        assert note["distill"]["training"]["learning_rate"] == 1e-4

    def test_a_network_not_trained_yet_may_change_and_old_checkpoints_go(self, content: dict[str, Any]) -> None:
        content["student"]["model"]["config"]["hidden_size"] = 16
        claim(content)
        assert not checkpoints(content)

    def test_an_arm_in_the_folder_may_have_the_budget_of_one_that_is_left_out(self, content: dict[str, Any]) -> None:
        twin = Path(content["output_dir"]) / "arms" / "e2e_equal_compute"
        twin.mkdir(parents=True)
        write_json(twin / TRAIN_RESULTS, {})
        claim({**content, "arms": ["e2e"]})
        content["finetune"]["training"]["learning_rate"] = 0.5
        with pytest.raises(RunError, match=r"finetune.training.learning_rate.*\(arms/e2e_equal_compute\)"):
            claim({**content, "arms": ["e2e"]})

    def test_arms_and_seeds_can_be_added_and_phases_shared_out(self, content: dict[str, Any]) -> None:
        claim({**content, "arms": ["e2e"], "repeat_seeds": [3], "equal_compute": True, "processes": 2})
        assert checkpoints(content)
