"""What a study says."""

from pathlib import Path

import pytest
from tiny_study import EPOCHS, write_study

from m2mkd.errors import RecipeError
from m2mkd.experiment.study.spec import load_study


def test_each_point_is_a_recipe_with_one_arm(tmp_path: Path) -> None:
    spec, points = load_study(write_study(tmp_path))
    assert [(point.curve, point.values[EPOCHS]) for point in points] == [
        *(("kd", 1), ("kd", 4)),
        *(("after_modules", 1), ("after_modules", 2)),
    ]
    assert spec.reference == "kd"
    for point in points:
        assert list(point.recipe.arms) == [point.curve]
        assert point.recipe.finetune.training["num_train_epochs"] == point.values[EPOCHS]
        assert (point.recipe.seed, point.recipe.repeat_seeds) == (0, [1])
        assert Path(point.recipe.output_dir).parent == tmp_path / "study" / "runs"
    assert points[2].recipe.distill.context == "teacher" and points[0].recipe.distill.context == "meta"
    assert points[2].recipe.arms["after_modules"].init == "modules"
    assert len({point.name for point in points}) == 4


def test_a_value_of_the_study_can_be_overridden(tmp_path: Path) -> None:
    spec, points = load_study(write_study(tmp_path), {"seeds": [3]})
    assert spec.seeds == [3]
    assert {point.recipe.seed for point in points} == {3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1, 1]}, r"`seeds` \[1, 1\] must all be different"),
        ({"baseline": "e2e"}, "`baseline` is 'e2e', but the curves are kd, after_modules"),
        ({"curves": {"kd": {"arm": "kd"}}}, "curves.kd: give either `points`"),
        ({"curves": {"kd": {"arm": "knowledge", "points": [{}]}}}, "'knowledge' is not a preset"),
        ({"curves": {"kd": {"arm": "kd", "points": [{"student.size": 3}]}}}, "student.size: there is no such key"),
        ({"curves": {"kd": {"arm": "kd", "points": [{EPOCHS: 1}, {EPOCHS: 1}]}}}, "are given twice"),
        ({"machines": 3}, "machines: there is no such key"),
        ({"recipe": "nowhere.yaml"}, "There is no recipe"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_study(write_study(tmp_path, **changes))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nowhere.yaml cannot be read"):
        load_study(tmp_path / "nowhere.yaml")
