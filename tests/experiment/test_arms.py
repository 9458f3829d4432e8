"""Arms are four words: presets, arms of a recipe's own, and what follows from the words."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import recipe_content
from transformers import AutoModelForImageClassification

from m2mkd.errors import RecipeError, RunError
from m2mkd.experiment import runner
from m2mkd.experiment.arms import PRESETS, ArmSpec, arm_of_folder, colors, named_specs, reference, resolve
from m2mkd.experiment.plan.plan import make_plan
from m2mkd.experiment.recipe_file import parse_recipe
from m2mkd.hub.push import files_to_push


KD_ALL = {"init": "random", "supervision": "teacher", "data": "train", "training": {"alpha": 1.0}}


def content(folder: Path, **changes: Any) -> dict[str, Any]:
    """The tiny recipe, one epoch per phase, with an arm of its own between two presets."""
    own = recipe_content(folder, arms=["e2e", {"kd_all": KD_ALL}, "m2mkd"])
    own["training"]["num_train_epochs"] = 1
    return {**own, **changes}


class TestAnArmOfTheRecipesOwn:
    @pytest.fixture(scope="class")
    def finished(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("own_arm")
        runner.run(parse_recipe(content(folder), "own"))
        return folder / "run"

    @pytest.fixture
    def report(self, finished: Path) -> dict[str, Any]:
        return json.loads((finished / "report.json").read_text())

    def test_it_runs_on_its_data_with_its_arguments(self, finished: Path, report: dict[str, Any]) -> None:
        model = AutoModelForImageClassification.from_pretrained(finished / "arms" / "kd_all")
        assert model.config.model_type == "vmoe"
        # all 24 images, of which it reads no label: alpha is 1
        result = report["arms"]["kd_all"]
        assert (result["images"], result["labels"]) == (24, 0)
        assert list(report["arms"]) == ["e2e", "kd_all", "m2mkd"]

    def test_it_is_reported_with_a_picture_and_compared(self, finished: Path, report: dict[str, Any]) -> None:
        compared = {entry["baseline"]: entry["budget"] for entry in report["comparisons"]}
        assert compared == {"e2e": "equal end-to-end epochs", "kd_all": "budgets of their own"}
        text = (finished / "report.md").read_text()
        assert "m2mkd − kd_all at budgets of their own" in text
        assert "- kd_all: end-to-end training to match the teacher's outputs" in text
        assert (finished / "report.png").stat().st_size > 10_000

    def test_it_has_a_card_and_can_be_pushed(self, finished: Path) -> None:
        files = files_to_push(finished, "kd_all", "user/kd-all")
        assert b"to match the outputs of a teacher" in files["README.md"]
        assert "model.safetensors" in files and not any(name.startswith("pairs/") for name in files)
        assert (finished / "arms" / "kd_all" / "README.md").is_file()

    def test_it_is_planned_with_the_flops_that_it_takes(self, tmp_path: Path, report: dict[str, Any]) -> None:
        plan = make_plan(parse_recipe(content(tmp_path), "own"))
        planned = {phase.name: phase.flops for phase in plan.phases}
        assert planned["arm kd_all"] == pytest.approx(report["arms"]["kd_all"]["train_flops"], rel=0.02)
        assert plan.totals["kd_all, teacher included"] > plan.totals["kd_all"] == planned["arm kd_all"]

    def test_its_words_may_not_change_while_it_is_finished(self, finished: Path) -> None:
        changed = content(finished.parent)
        changed["arms"] = ["e2e", {"kd_all": {**KD_ALL, "data": "labelled"}}, "m2mkd"]
        with pytest.raises(RunError, match=r"arms.kd_all.data: train → labelled \(arms/kd_all\)"):
            runner.run(parse_recipe(changed, "changed"))

    def test_it_stays_in_the_report_when_the_recipe_leaves_it_out(self, finished: Path) -> None:
        runner.run(parse_recipe(content(finished.parent, arms=["m2mkd"]), "fewer"))
        assert {"kd_all", "e2e"} < json.loads((finished / "report.json").read_text())["arms"].keys()


class TestBudgets:
    def test_a_budget_without_a_sibling_is_spent_and_not_exceeded_by_an_epoch(self, tmp_path: Path) -> None:
        arm = {"longer": {**KD_ALL, "budget": {"flops_of": "m2mkd"}}}
        recipe = parse_recipe(content(tmp_path, arms=[arm, "m2mkd"]), "budget")
        runner.run(recipe)
        arms = json.loads((tmp_path / "run" / "report.json").read_text())["arms"]
        longer, budget = arms["longer"], arms["m2mkd"]["train_flops"]
        epoch = longer["train_flops"] / longer["epochs"]
        assert budget <= longer["train_flops"] * (1 + 1e-9) and longer["train_flops"] < budget + epoch

    def test_equal_compute_is_a_budget(self) -> None:
        arms = resolve({name: PRESETS[name] for name in ("e2e", "kd", "m2mkd")}, equal_compute=True)
        assert list(arms) == ["e2e", "e2e_equal_compute", "kd", "kd_equal_compute", "m2mkd"]
        assert (arms["kd_equal_compute"].budget, arms["kd_equal_compute"].sibling) == ("m2mkd", "kd")
        assert "It had as many epochs as the compute of m2mkd allows." in arms["kd_equal_compute"].text

    @pytest.mark.parametrize(
        "arms, message",
        [
            ({"a": {"budget": {"flops_of": "b"}}}, "`flops_of: b`; name an arm"),
            ({"a": {"budget": {"flops_of": "a"}}}, "name an arm"),
            ({"e2e": {"budget": {"flops_of": "m2mkd"}, "training": {"max_steps": 3}}}, "either `budget` or a length"),
        ],
    )
    def test_a_budget_that_means_nothing_is_refused(self, tmp_path: Path, arms: dict[str, Any], message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            parse_recipe(content(tmp_path, arms=arms), "bad")


class TestWords:
    @pytest.mark.parametrize(
        "arms, message",
        [
            (["foo"], "'foo' is not a preset"),
            (["e2e", "e2e"], "given twice"),
            ([{"../up": KD_ALL}], "cannot name an arm's folder"),
            ({"e2e": 3}, "give a mapping"),
            ({"e2e": {"init": "pretrained"}}, "arms.e2e.init"),
            ({"own": {"training": {"alpha": 0.5}}}, "`alpha` needs a teacher"),
            ({"own": {"data": "nowhere"}}, "`arms.own.data` is 'nowhere'"),
            ([], "at least 1"),
        ],
    )
    def test_bad_arms_are_refused(self, tmp_path: Path, arms: Any, message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            parse_recipe(content(tmp_path, arms=arms), "bad")

    def test_a_preset_gives_what_is_not_said(self) -> None:
        assert named_specs({"kd": {"data": "train"}}) == {"kd": {"supervision": "teacher", "data": "train"}}

    def test_a_recipe_is_written_as_it_was_given(self, tmp_path: Path) -> None:
        recipe = parse_recipe(content(tmp_path), "own")
        dumped = recipe.model_dump(mode="json")["arms"]
        assert dumped[0] == "e2e" and dumped[2] == "m2mkd"
        assert parse_recipe({**content(tmp_path), "arms": dumped}, "again") == recipe

    def test_arms_in_a_folder_are_known_by_their_words_or_their_preset(self) -> None:
        arm = arm_of_folder("mine", {**ArmSpec(init="modules").model_dump(), "text": "…"})
        assert arm is not None and arm.is_modular
        twin = arm_of_folder("e2e_equal_compute", None)
        assert twin is not None and twin.budget == "m2mkd"
        assert arm_of_folder("mine", None) is None

    def test_every_arm_has_a_colour_of_its_own(self) -> None:
        specs = {**PRESETS, **{f"own_{i}": ArmSpec(data=str(i)) for i in range(4)}}
        own = colors(list(resolve(specs, equal_compute=True).values()))
        assert len(set(own.values())) == len(own) == 2 * len(specs) - 1

    def test_the_others_are_compared_with_the_first_that_starts_from_modules(self) -> None:
        arms = list(resolve({name: PRESETS[name] for name in ("kd", "m2mkd_kd", "m2mkd")}).values())
        compared = reference(arms)
        assert compared is not None and compared.name == "m2mkd_kd"
        assert reference(arms[:1]) is None


def test_an_arm_with_only_default_words_survives_being_written_down(tmp_path: Path) -> None:
    recipe = parse_recipe(content(tmp_path, arms=[{"plain": {"init": "random"}}]), "plain")
    again = parse_recipe(recipe.model_dump(mode="json"), "plain again")
    assert again.arms == recipe.arms == {"plain": ArmSpec()}
