"""Plans. That their FLOPs are those of a run is tested where recipes run: test_miniature."""

from pathlib import Path
from typing import Any

import pytest
from tiny_run import published, recipe_content
from torch import nn
from transformers import Trainer, ViTConfig, ViTForImageClassification

from m2mkd.errors import DataError, StageError
from m2mkd.experiment.plan.plan import Plan, _busiest, make_plan
from m2mkd.experiment.recipe import Recipe
from m2mkd.experiment.recipe_file import load_recipe, parse_recipe
from m2mkd.experiment.run_data import RunData


RECIPES = Path(__file__).parents[3] / "recipes"


def content(folder: Path, **changes: Any) -> dict[str, Any]:
    """The tiny recipe, one epoch a phase."""
    own = recipe_content(folder)
    own["training"]["num_train_epochs"] = 1
    return {**own, **changes}


def planned(plan: Plan) -> dict[str, float]:
    return {phase.name: phase.flops for phase in plan.phases}


class TestMakePlan:
    @pytest.fixture
    def recipe(self, tmp_path: Path) -> Recipe:
        return parse_recipe(content(tmp_path), "tiny")

    def test_nothing_is_trained_and_nothing_is_on_a_device(
        self, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def forbidden(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("a plan trains nothing")

        monkeypatch.setattr(Trainer, "train", forbidden)
        devices = set()
        forward = nn.Linear.forward

        def linear(self: nn.Linear, *args: Any) -> Any:
            devices.add(self.weight.device.type)
            return forward(self, *args)

        monkeypatch.setattr(nn.Linear, "forward", linear)
        make_plan(recipe)
        assert devices == {"meta"} and not (tmp_path / "run").exists()

    def test_parameters_steps_and_batches(self, recipe: Recipe) -> None:
        phases = {phase.name: phase for phase in make_plan(recipe, gpus=2).phases}
        assert list(phases) == [
            *("meta", "teacher: incubation", "teacher: fine-tuning"),
            *("pair 0", "pair 1", "pairs", "arm e2e", "arm kd", "arm m2mkd"),
        ]
        # 24 images in batches of 6 on 2 devices
        assert (phases["pairs"].images, phases["pairs"].batch, phases["pairs"].steps) == (24, 12, 2)
        assert (phases["arm e2e"].images, phases["arm e2e"].steps) == (12, 1)
        assert phases["pairs"].parameters == phases["pair 0"].parameters + phases["pair 1"].parameters
        assert phases["arm e2e"].frozen == 0
        assert phases["arm kd"].frozen == phases["teacher: fine-tuning"].parameters
        # the meta model and the teacher's two stages
        assert phases["pairs"].frozen == phases["meta"].parameters + phases["teacher: fine-tuning"].parameters
        assert all(phase.memory >= 16 * phase.parameters for phase in phases.values())

    def test_the_path_of_an_arm_has_all_that_it_reads_and_the_pairs_side_by_side(self, recipe: Recipe) -> None:
        flops = {devices: make_plan(recipe, devices).paths for devices in (1, 2, 4)}
        own = planned(make_plan(recipe))
        pairs = [own["pair 0"], own["pair 1"]]
        assert list(flops[1]["m2mkd"]) == ["meta", "teacher", "pairs", "arms/m2mkd"]
        assert list(flops[1]["e2e"]) == ["arms/e2e"]
        for devices, expected in ((1, sum(pairs)), (2, max(pairs)), (4, max(pairs) / 2)):
            assert flops[devices]["m2mkd"]["pairs"] == expected
            assert flops[devices]["m2mkd"]["arms/m2mkd"] == own["arm m2mkd"] / devices
            assert (
                flops[devices]["kd"]["teacher"] == (own["teacher: incubation"] + own["teacher: fine-tuning"]) / devices
            )

    @pytest.mark.parametrize("devices, expected", [(1, 14), (2, 8), (3, 6), (4, 6), (8, 3)])
    def test_parts_are_shared_out_the_longest_first(self, devices: int, expected: float) -> None:
        # on 2 devices 6 + 2 and 4 + 2; on 8, each part has 2 of them
        assert _busiest([2, 6, 2, 4], devices) == expected

    def test_pairs_that_feed_each_other_are_one_part(self, tmp_path: Path) -> None:
        own = content(tmp_path)
        own["distill"] = {**own["distill"], "context": "teacher", "match": "boundary", "feed": "student"}
        plan = make_plan(parse_recipe(own, "fed"), gpus=2)
        assert plan.paths["m2mkd"]["pairs"] == planned(plan)["pairs"] / 2

    def test_the_largest_batch_that_fits(self, recipe: Recipe) -> None:
        for phase in make_plan(recipe).phases:
            assert phase.device_batch == 6 and phase.memory == phase.weights + 6 * phase.activations
            assert phase.largest_batch(phase.memory + 1) == 6
            assert phase.largest_batch(phase.weights - 1) == 0

    def test_published_sets_need_no_data(self, tmp_path: Path) -> None:
        own = content(tmp_path)
        for name in ("train", "labelled"):
            own["data"][name] = {"source": "imagenet-1k", "split": "train", "image_size": 8}
        own["data"]["labelled"]["samples_per_class"] = 13
        phases = {phase.name: phase for phase in make_plan(parse_recipe(own, "published")).phases}
        assert phases["meta"].images == 1_281_167 and phases["arm e2e"].images == 13_000

    def test_each_set_is_described(self, tmp_path: Path) -> None:
        published = load_recipe(RECIPES / "nac_tiny_imagenet_scale_free.yaml", {"arms": ["e2e"]})
        (ood,) = [line for line in make_plan(published).data if line.startswith("data.ood:")]
        assert "an unknown number of images of 62 classes" in ood
        plan = make_plan(parse_recipe(content(tmp_path), "tiny"))
        assert plan.data == RunData(parse_recipe(content(tmp_path), "tiny")).describe()

    @pytest.mark.parametrize("name", ["train", "iid"])
    def test_a_published_set_without_the_split_is_refused(self, tmp_path: Path, name: str) -> None:
        own = content(tmp_path)
        own["data"][name] = {**own["data"][name], "source": "cifar10", "split": "tset"}
        with pytest.raises(DataError, match=f"data.{name}: cifar10 has no split 'tset': set split to 'train'"):
            make_plan(parse_recipe(own, "splits"))

    def test_a_published_teacher_costs_nothing_and_may_call_the_classes_otherwise(self, tmp_path: Path) -> None:
        own = content(tmp_path)
        config = ViTConfig(**own["teacher"]["model"]["config"], image_size=16, num_labels=3)
        published(tmp_path / "published", ViTForImageClassification(config))
        own["teacher"] = {"pretrained": str(tmp_path / "published"), "depths": [2, 1]}
        own["meta"] = {"init": "from_teacher", "data": "train"}
        plan = make_plan(parse_recipe(own, "published"))
        assert "teacher" not in planned(plan) and planned(plan)["meta"] > 0
        assert plan.totals.keys() == {"e2e", "kd", "m2mkd", "m2mkd, meta model and teacher included"}

    def test_a_teacher_of_kd_alone_needs_no_meta_model(self, tmp_path: Path) -> None:
        own = content(tmp_path, arms=["kd"])
        config = ViTConfig(**own["teacher"]["model"]["config"], image_size=8, num_labels=3)
        published(tmp_path / "published", ViTForImageClassification(config))
        own["teacher"] = {"pretrained": str(tmp_path / "published"), "depths": [2, 1]}
        assert planned(make_plan(parse_recipe(own, "kd"))).keys() == {"arm kd"}

    def test_baselines_of_equal_compute_are_planned_too(self, tmp_path: Path) -> None:
        plan = make_plan(parse_recipe(content(tmp_path, equal_compute=True), "equal"))
        flops = planned(plan)
        epoch = next(phase for phase in plan.phases if phase.name == "arm e2e").flops
        assert plan.totals["m2mkd"] <= flops["arm e2e_equal_compute"] < plan.totals["m2mkd"] + epoch

    def test_max_steps_is_what_is_planned(self, tmp_path: Path) -> None:
        own = content(tmp_path)
        own["training"]["max_steps"] = 3
        assert {phase.steps for phase in make_plan(parse_recipe(own, "steps")).phases} == {3}

    def test_a_set_that_is_not_there_cannot_be_counted(self, tmp_path: Path) -> None:
        own = content(tmp_path)
        own["data"]["train"]["source"] = "imagefolder:/nowhere"
        with pytest.raises(DataError, match="data.train: .*/nowhere"):
            make_plan(parse_recipe(own, "nowhere"))

    def test_networks_that_do_not_fit_are_found_without_training(self, tmp_path: Path) -> None:
        own = content(tmp_path)
        own["teacher"]["model"]["config"]["hidden_size"] = 16
        with pytest.raises(StageError, match="The teacher is 16 wide and the meta model 12"):
            make_plan(parse_recipe(own, "widths"))
