"""Which phases a recipe needs, what each reads, and what its artifact depends on."""

from pathlib import Path
from typing import Any

import pytest
from tiny_run import recipe_content

from m2mkd.experiment.phases import Phase, phases_of
from m2mkd.experiment.recipe_file import parse_recipe
from m2mkd.experiment.run_data import RunData
from m2mkd.experiment.session import Session
from m2mkd.screen import Screen


def phases(folder: Path, **changes: Any) -> dict[str, Phase]:
    recipe = parse_recipe(recipe_content(folder, **changes), "tiny")
    return phases_of(Session(recipe, RunData(recipe), recipe.seed, Screen()))


def reads(found: dict[str, Phase]) -> dict[str, tuple[str, ...]]:
    return {name: phase.reads for name, phase in found.items()}


class TestPhasesOf:
    def test_each_comes_after_what_it_reads(self, tmp_path: Path) -> None:
        assert reads(phases(tmp_path)) == {
            "meta": (),
            "teacher": ("meta",),
            "pairs": ("meta", "teacher"),
            "arms/e2e": (),
            "arms/kd": ("teacher",),
            "arms/m2mkd": ("pairs",),
        }

    @pytest.mark.parametrize(
        "arms, needed",
        [
            (["e2e"], ["arms/e2e"]),
            (["kd"], ["meta", "teacher", "arms/kd"]),
            (["m2mkd_kd"], ["meta", "teacher", "pairs", "arms/m2mkd_kd"]),
        ],
    )
    def test_only_what_the_arms_need(self, tmp_path: Path, arms: list[str], needed: list[str]) -> None:
        assert list(phases(tmp_path, arms=arms)) == needed

    def test_a_meta_model_from_the_teacher_comes_after_it(self, tmp_path: Path) -> None:
        found = phases(tmp_path, meta={"init": "from_teacher", "data": "train"})
        assert list(found)[:2] == ["teacher", "meta"]
        assert (found["meta"].reads, found["teacher"].reads) == (("teacher",), ())

    def test_arms_of_equal_compute_wait_for_their_siblings_and_the_pairs(self, tmp_path: Path) -> None:
        found = phases(tmp_path, equal_compute=True)
        assert found["arms/e2e_equal_compute"].reads == ("pairs", "arms/e2e")
        assert found["arms/kd_equal_compute"].reads == ("pairs", "teacher", "arms/kd")
        # the longest start first
        assert found["arms/kd_equal_compute"].rank < found["arms/kd"].rank < found["arms/e2e"].rank

    def test_an_arm_depends_on_its_own_data(self, tmp_path: Path) -> None:
        arms = [{"all": {"supervision": "teacher", "data": "train"}}, "e2e"]
        found = phases(tmp_path, arms=arms)
        assert found["arms/all"].data == ("train", "iid", "ood")
        assert found["arms/e2e"].data == ("labelled", "iid", "ood")

    def test_nothing_is_finished_in_an_empty_folder(self, tmp_path: Path) -> None:
        assert not any(phase.is_finished() for phase in phases(tmp_path).values())

    def test_pairs_that_others_are_asked_for_are_missing(self, tmp_path: Path) -> None:
        found = phases(tmp_path, distill={"data": "train", "pairs": [1]})
        assert found["pairs"].missing() == [0] and found["meta"].missing() == []
        assert [path.name for path in found["pairs"].artifacts] == ["0", "1"]
