import contextlib
import io
import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image
from testing_utils import code_blocks, commands
from typer.testing import CliRunner

from m2mkd.cli import app
from m2mkd.errors import HubError
from m2mkd.experiment.recipe_file import parse_recipe
from m2mkd.experiment.report.cards import render_card, write_cards
from m2mkd.model_cards.run_card import card_data, public_recipe
from m2mkd.model_cards.tables import teacher_text


def report_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())


def test_the_metadata_survive_a_round_trip_and_name_the_results_of_the_weights(finished_run: Path, tmp_path: Path):
    render_card(finished_run, "m2mkd", "alice/tiny").save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data
    assert isinstance(data, ModelCardData)
    assert (data.library_name, data.pipeline_tag, data.license) == (
        "transformers",
        "image-classification",
        "apache-2.0",
    )
    assert {"m2mkd", "vmoe"} <= set(data.tags)
    measured = report_of(finished_run)["arms"]["m2mkd"]
    results = data.eval_results
    assert all(isinstance(result, EvalResult) for result in results)
    assert {result.dataset_name: result.metric_value for result in results} == {
        "iid (imagefolder:test)": measured["iid"]["accuracy"],
        "ood (imagefolder:test)": measured["ood"]["accuracy"],
    }
    assert data.model_name == "tiny"
    # what the Hub reads: a list of one model with a list of results
    assert [entry["name"] for entry in data.to_dict()["model-index"]] == ["tiny"]


@pytest.mark.parametrize("arm", ["e2e", "m2mkd"])
def test_the_card_tells_what_was_measured_and_how_to_repeat_it(finished_run: Path, arm: str):
    card, report = render_card(finished_run, arm, "alice/tiny"), report_of(finished_run)
    text = card.text
    for name in report["arms"]:
        assert f"| {name} | {100 * report['arms'][name]['iid']['accuracy']:.1f} |" in text
    assert "seed 0" in " ".join(text.split()) and "TFLOPs" in text and "@misc{riquelme2021vmoe" in text
    assert "The arms were trained with one seed" in text
    (recipe,) = code_blocks(card.content, "yaml")
    parse_recipe(yaml.safe_load(recipe), "the card's recipe")
    assert "m2mkd assemble" not in text
    assert "{{" not in card.content and "None" not in text


def test_the_card_says_where_the_teacher_came_from(finished_run: Path):
    said = "It was incubated inside the meta model and then fine-tuned in this run."
    assert said in " ".join(render_card(finished_run, "m2mkd", "alice/tiny").text.split())
    assert said not in render_card(finished_run, "e2e", "alice/tiny").text
    (row,) = [
        line
        for line in render_card(finished_run, "m2mkd", "alice/tiny").text.splitlines()
        if "| teacher | train" in line
    ]
    assert "imagefolder" in row


@pytest.mark.parametrize(
    "teacher, said",
    [
        ({"phases": {"finetuning": {}}}, "The teacher has 1,234 parameters. It was trained in this run."),
        (
            {"pretrained": "google/vit", "network": {"folder": None}},
            "The teacher is google/vit from the Hub, a ViT with 2 layers of width 8 and 1,234 parameters.",
        ),
        (
            {"pretrained": "/home/me/mine", "network": {"folder": "mine"}},
            'named "mine". It was not trained in this run, and where its weights came from is not recorded.',
        ),
        ({"pretrained": "/home/me/mine"}, "The teacher is a pretrained network with 1,234 parameters. It was not"),
    ],
)
def test_teachers_of_every_source(teacher: dict[str, Any], said: str):
    if "network" in teacher:
        sizes = {"class": "ViT", "num_hidden_layers": 2, "hidden_size": 8}
        teacher = {**teacher, "network": {**sizes, **teacher["network"]}}
    text = teacher_text({"parameters": 1234, **teacher})
    assert said in text and "/home" not in text


def test_a_pretrained_teacher_has_no_training_data(finished_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    report = report_of(run)
    report["recipe"]["data"]["only the teacher's"] = {**report["recipe"]["data"]["train"], "source": "org/set"}
    report["recipe"]["teacher"]["data"] = "only the teacher's"
    (run / "report.json").write_text(json.dumps(report))
    card = render_card(run, "m2mkd", "alice/tiny")
    assert "| teacher | only the teacher's | org/set |" in card.text and card.data.datasets == ["org/set"]
    report["teacher"]["pretrained"] = "google/vit"
    (run / "report.json").write_text(json.dumps(report))
    card = render_card(run, "m2mkd", "alice/tiny")
    assert "| teacher | only" not in card.text and "| meta model | train |" in card.text
    assert card.data.datasets is None


def test_no_path_of_this_machine_and_no_token_is_published(finished_run: Path):
    card = render_card(finished_run, "m2mkd", "alice/tiny")
    assert str(finished_run.parent) not in card.content and "/tmp" not in card.content
    recipe = {
        "output_dir": "/home/me/run",
        "teacher": {"pretrained": "/home/me/vit"},
        "training": {"hub_token": "hf_secret", "learning_rate": 0.1, "warmup_steps": 3},
        "data": {
            "a": {"source": "imagefolder:images/mine"},
            "b": {"source": "C:\\me\\set"},
            "c": {"source": "org/set"},
        },
    }
    assert public_recipe(recipe, "run") == {
        "output_dir": "runs/run",
        "teacher": {"pretrained": "vit"},
        "training": {"learning_rate": 0.1, "warmup_steps": 3},
        "data": {"a": {"source": "imagefolder:mine"}, "b": {"source": "set"}, "c": {"source": "org/set"}},
    }


def test_every_arm_of_a_finished_run_has_its_card(finished_run: Path):
    for arm in ("e2e", "m2mkd"):
        folder = finished_run / "arms" / arm
        card = ModelCard.load(folder / "README.md")
        assert f'pipeline("image-classification", model="{folder}")' in card.content
        assert card.data.model_name == f"tiny-{arm}" and f"\n# tiny-{arm}\n" in card.content
        assert "pip install m2mkd" in card.content and "import m2mkd" in card.content
    # only the distilled student is made of pairs
    assert f"m2mkd assemble student {finished_run}\n" in card.content
    assert "m2mkd assemble" not in ModelCard.load(finished_run / "arms" / "e2e" / "README.md").content


def test_the_arms_of_further_seeds_have_cards_of_their_own(finished_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    shutil.copytree(run / "arms" / "e2e", run / "seeds" / "7" / "arms" / "e2e")
    report = report_of(run)
    arm = {**report["arms"]["e2e"], "iid": {**report["arms"]["e2e"]["iid"], "accuracy": 0.125}}
    report["seeds"]["7"] = {"arms": {"e2e": arm}}
    (run / "report.json").write_text(json.dumps(report))
    cards = write_cards(run)
    folders = [path.parent.relative_to(run).as_posix() for path in cards]
    assert folders == ["arms/e2e", "arms/m2mkd", "seeds/7/arms/e2e"]
    card = ModelCard.load(cards[-1])
    assert card.data.eval_results[0].metric_value == 0.125 and "seed 7" in " ".join(card.text.split())


def test_the_code_blocks_run_as_they_stand(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8), "red").save("image.png")
    card = ModelCard.load(finished_run / "arms" / "m2mkd" / "README.md")
    scripts = code_blocks(card.content, "python")
    assert len(scripts) == 2
    Path("card.py").write_text("\n".join(scripts))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path("card.py")
    assert out.getvalue().splitlines()[-1] in ("blue", "green", "red")
    install, assemble = commands(card.content)
    assert install == ["pip", "install", "m2mkd"]
    assert CliRunner().invoke(app, assemble[1:]).exit_code == 0 and Path("student", "model.safetensors").is_file()


def test_with_its_code_a_model_needs_no_package_of_ours(finished_run: Path):
    card = render_card(finished_run, "m2mkd", "alice/tiny", with_code=True)
    scripts = code_blocks(card.content, "python")
    assert "import m2mkd" not in "".join(scripts)
    assert all("trust_remote_code=True" in script for script in scripts)


def test_a_run_without_a_report_or_arm_is_refused_with_the_way_out(finished_run: Path, tmp_path: Path):
    with pytest.raises(HubError, match=r"no arm 'kd', only e2e, m2mkd"):
        render_card(finished_run, "kd", "alice/tiny")
    with pytest.raises(HubError, match=r"no seed 3, only 0"):
        render_card(finished_run, "e2e", "alice/tiny", seed=3)
    (tmp_path / "recipe.json").touch()
    with pytest.raises(HubError, match=f"m2mkd report {tmp_path}"):
        render_card(tmp_path, "m2mkd", "alice/tiny")
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(HubError, match="is damaged"):
        render_card(tmp_path, "m2mkd", "alice/tiny")


@pytest.mark.parametrize("folder, expected", [(None, "google/vit"), ("mine", None)])
def test_the_card_links_its_teacher_and_its_data_sets(finished_run: Path, folder: str | None, expected: str | None):
    report = report_of(finished_run)
    network = {"class": "ViT", "num_hidden_layers": 2, "hidden_size": 8, "folder": folder}
    report["teacher"] |= {"pretrained": "google/vit", "network": network}
    report["recipe"]["data"]["iid"]["source"] = "cifar10:/data/cifar"
    data = card_data(report, report["arms"]["m2mkd"], "tiny", "apache-2.0")
    assert data.base_model == expected and data.datasets == ["uoft-cs/cifar10"]
    assert data.eval_results[0].dataset_type == "uoft-cs/cifar10"
    # an arm that needed no teacher has no base model
    assert card_data(report, report["arms"]["e2e"], "tiny", "apache-2.0").base_model is None
