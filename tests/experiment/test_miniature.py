"""Every recipe of the repository loads, plans and runs from end to end, in miniature."""

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from m2mkd.experiment import runner
from m2mkd.experiment.miniature import make_miniature
from m2mkd.experiment.plan.plan import make_plan
from m2mkd.experiment.recipe import Recipe
from m2mkd.experiment.recipe_file import load_recipe


RECIPES = Path(__file__).parents[2] / "recipes"
# dinov2_small has a teacher that is converted first: tests/experiment/phases/test_probe.py
PATHS = {
    "default": None,
    **{path.stem: path for path in sorted(RECIPES.glob("*.yaml")) if path.stem != "dinov2_small"},
}
# They differ from each other in the graph or the size only, and nac_digits runs: checked without a run.
VARIANTS = {name for name in PATHS if "imagenet" in name and name.startswith("nac_")}


@pytest.fixture(scope="module", autouse=True)
def little_garbage_to_look_through() -> Iterator[None]:
    # each training ends with a collection, which looks at every object of the libraries
    gc.freeze()
    yield
    gc.unfreeze()


def run_miniature(path: Path | None, folder: Path, **overrides: Any) -> tuple[Recipe, dict[str, Any]]:
    """The miniature of a recipe, run in `folder`, and its report."""
    miniature = make_miniature(load_recipe(path, {"output_dir": str(folder / "out"), **overrides}))
    runner.run(miniature)
    return miniature, json.loads((folder / "out-miniature" / "run" / "report.json").read_text())


def counted(report: dict[str, Any]) -> dict[str, float]:
    """What torch's counter found in the phases of a run, by the names of the plan."""
    flops = {} if report["meta"] is None else {"meta": report["meta"]["train_flops"]}
    teacher = {phase: result["train_flops"] for phase, result in report["teacher"]["phases"].items()}
    if "incubation" in teacher:
        flops |= {"teacher: incubation": teacher["incubation"], "teacher: fine-tuning": teacher["finetuning"]}
    else:
        flops |= {"teacher": teacher["finetuning"]}
    for arm, result in report["arms"].items():
        phases = result.get("phases", {"finetune": result})
        flops[f"arm {arm}"] = phases["finetune"]["train_flops"]
        if "distill" in phases:
            flops["pairs"] = phases["distill"]["train_flops"]
    return flops


def assert_planned(recipe: Recipe, report: dict[str, Any]) -> None:
    """The plan, on the meta device, has the FLOPs of the run."""
    plan, found = make_plan(recipe), counted(report)
    planned = {phase.name: phase.flops for phase in plan.phases}
    assert found.keys() == {name for name in planned if not name.startswith("pair ")}
    for name, flops in found.items():
        assert planned[name] == pytest.approx(flops, rel=0.02), name
    # alone, a pair repeats the prefix, of which the first two pairs share nothing inside a meta model
    alone = sum(flops for name, flops in planned.items() if name.startswith("pair "))
    assert (alone > planned["pairs"] * 1.01) == (len(recipe.student.depths) > 2 or recipe.distill.context == "teacher")
    name = next(name for name, arm in recipe.all_arms.items() if arm.is_modular)
    assert plan.totals[name] == pytest.approx(found["pairs"] + found[f"arm {name}"], rel=0.02)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the recipe that others extend, with all its arms. Not to be changed."""
    folder = tmp_path_factory.mktemp("extended")
    assert_planned(*run_miniature(RECIPES / "nac_imagenet_scale_free.yaml", folder))
    return folder / "out-miniature" / "run"


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_the_students_of_variants_are_built_and_planned(tmp_path: Path, name: str) -> None:
    recipe = make_miniature(load_recipe(PATHS[name], {"output_dir": str(tmp_path / "out"), "arms": ["e2e"]}))
    (arm,) = make_plan(recipe).phases
    assert arm.name == "arm e2e" and arm.flops > 0


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * (name in VARIANTS), id=name) for name, path in PATHS.items()],
)
def test_every_recipe_runs_in_miniature(tmp_path: Path, extended: Path, path: Path | None) -> None:
    overrides = {}
    if path is not None and path.stem.startswith("nac_") and "imagenet" in path.stem:
        # they share meta model and teacher, and what e2e does m2mkd does, too
        overrides = {"arms": ["m2mkd"]}
        for phase in ("meta", "teacher"):
            shutil.copytree(extended / phase, tmp_path / "out-miniature" / "run" / phase)
    miniature, report = run_miniature(path, tmp_path, **overrides)
    assert report["arms"].keys() == set(miniature.arms)
    for result in report["arms"].values():
        assert result["iid"]["n"] > 0 and (result["ood"] is None) == (miniature.evaluation.ood is None)
    if miniature.distill.context == "meta":
        assert report["hybrids"]["stages"].keys() == {str(index) for index in range(len(miniature.student.depths))}
    text = (Path(miniature.output_dir) / "report.md").read_text()
    assert ("Before alignment" in text) == miniature.is_aligned
    assert_planned(miniature, report)


def test_the_images_of_published_sets_lie_in_their_own_folders(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "nac_tiny_imagenet_scale_free.yaml", {"output_dir": str(tmp_path / "out")})
    miniature = make_miniature(recipe)
    folder = tmp_path / "out-miniature"
    assert miniature.data["iid"].source == f"tiny-imagenet:{folder / 'tiny-imagenet'}"
    assert (folder / "tiny-imagenet" / "val" / "val_annotations.txt").is_file()
    assert list((folder / "imagenet-1k" / "train").glob("n*/*.JPEG"))
    assert miniature.data["train"].image_size != miniature.data["tiny"].image_size
    # what makes the experiment is kept
    assert miniature.data["train"].repeated == 3 and miniature.finetune.training["weight_decay"] == 0.075
    assert miniature.student.model.config["graph_prior"] == "barabasi_albert"
