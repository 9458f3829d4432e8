"""Arms that are upcycled from a dense network."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import tiny_recipe

from m2mkd.errors import RecipeError, StageError
from m2mkd.experiment.artifact import read_results
from m2mkd.experiment.phases import phases_of
from m2mkd.experiment.plan.plan import make_plan
from m2mkd.experiment.recipe import Recipe
from m2mkd.experiment.report.read import read_report
from m2mkd.experiment.run_data import RunData
from m2mkd.experiment.runner import run
from m2mkd.experiment.session import Session
from m2mkd.screen import Screen


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    upcycle = {"source": "dense", "data": "train", "training": {"num_train_epochs": 1}}
    recipe = tiny_recipe(tmp_path_factory.mktemp("upcycled"), arms=["upcycle", "upcycle_kd"], upcycle=upcycle)
    run(recipe)
    return recipe


def test_the_experts_start_as_copies_of_the_dense_network(recipe: Recipe) -> None:
    phases = phases_of(Session(recipe, RunData(recipe), 0, Screen()))
    model, _ = phases["arms/upcycle"].student()
    dense = load_file(Path(recipe.output_dir) / "dense" / "model.safetensors")
    for layer, block in enumerate(model.vmoe.layers):
        for expert in range(2):
            assert torch.equal(block.mlp.experts.up_proj[expert], dense[f"vmoe.layers.{layer}.mlp.fc1.weight"])


def test_its_compute_includes_the_dense_network(recipe: Recipe) -> None:
    report = read_report(Path(recipe.output_dir))
    dense = read_results(Path(recipe.output_dir) / "dense")
    for name in ("upcycle", "upcycle_kd"):
        result = report["arms"][name]
        own = read_results(Path(recipe.output_dir) / "arms" / name)
        assert result["train_flops"] == pytest.approx(dense["train_flops"] + own["train_flops"])
        assert result["phases"].keys() == {"dense", "finetune"}
        assert result["images"] == 24
    assert report["arms"]["upcycle"]["arm"]["extra"] == []
    assert report["arms"]["upcycle_kd"]["arm"]["extra"] == ["teacher"]
    plan = make_plan(recipe)
    for name in ("upcycle", "upcycle_kd"):
        assert plan.totals[name] == pytest.approx(report["arms"][name]["train_flops"], rel=0.02)


def test_the_dense_network_can_learn_from_the_teacher(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, arms=["upcycle"], upcycle={"supervision": "teacher"})
    phases = phases_of(Session(recipe, RunData(recipe), 0, Screen()))
    assert list(phases) == ["meta", "teacher", "dense", "arms/upcycle"]
    assert recipe.all_arms["upcycle"].extra == ("teacher",)


def test_a_teacher_of_another_width_is_refused(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, arms=["upcycle"], upcycle={"source": "teacher"})
    with pytest.raises(StageError, match="hidden_size"):
        run(recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ["upcycle"]}, "an arm has `init: upcycled`, but there is no `upcycle`"),
        (
            {"arms": ["upcycle"], "upcycle": {}, "student": {"model": {"model_type": "vit"}, "depths": [1, 1]}},
            "a vit has no experts",
        ),
    ],
)
def test_what_cannot_be_upcycled_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        tiny_recipe(tmp_path, **changes)
