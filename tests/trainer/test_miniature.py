"""Every recipe of the repository loads, plans and runs from end to end, in miniature."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from m2mkd.trainer import runner
from m2mkd.trainer.miniature import make_miniature
from m2mkd.trainer.plan import make_plan
from m2mkd.trainer.recipe import load_recipe


RECIPES = Path(__file__).parents[2] / "recipes"
PATHS = {"default": None, **{path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}}


@pytest.fixture(scope="module", autouse=True)
def little_garbage_to_look_through() -> Iterator[None]:
    # each training ends with a collection, which looks at every object of the libraries
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_every_recipe_runs_in_miniature(tmp_path: Path, path: Path | None) -> None:
    # a recipe that extends another differs in its student, which the arms of that one hold, too
    arms = {"arms": ["m2mkd"]} if path is not None and "\nextends: " in path.read_text() else {}
    recipe = load_recipe(path, {"output_dir": str(tmp_path / "out"), **arms})
    miniature = make_miniature(recipe)
    runner.run(miniature)
    report = json.loads((tmp_path / "out-miniature" / "run" / "report.json").read_text())
    assert set(recipe.arms) <= report["arms"].keys()
    assert len(list((tmp_path / "out-miniature" / "run" / "pairs").iterdir())) == len(recipe.student.depths)
    for result in report["arms"].values():
        assert result["iid"]["n"] > 0 and (result["ood"] is None) == (recipe.evaluation.ood is None)
    plan = {phase.name: phase for phase in make_plan(miniature).phases}
    assert plan["pairs"].flops == pytest.approx(report["arms"]["m2mkd"]["phases"]["distill"]["train_flops"], rel=0.02)


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
