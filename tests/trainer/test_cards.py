import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image

from m2mkd.trainer.cards import public_recipe, render_card
from m2mkd.trainer.hub import HubError, export_hub_code
from m2mkd.trainer.recipe import parse_recipe


def blocks(card: ModelCard, language: str) -> list[str]:
    """The code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", card.content, flags=re.DOTALL | re.MULTILINE)


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
    (recipe,) = blocks(card, "yaml")
    parse_recipe(yaml.safe_load(recipe), "the card's recipe")
    assert ("m2mkd assemble" in text) is False
    assert "{{" not in card.content and "None" not in text


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


@pytest.mark.parametrize("with_code", [False, True])
def test_the_code_blocks_run_as_they_stand(finished_run: Path, tmp_path: Path, with_code: bool):
    shutil.copytree(finished_run / "arms" / "m2mkd", tmp_path / "alice" / "tiny")
    if with_code:
        export_hub_code(tmp_path / "alice" / "tiny")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "image.png")
    card = render_card(finished_run, "m2mkd", "alice/tiny", with_code=with_code)
    scripts = blocks(card, "python")
    assert len(scripts) == 2 and ("import m2mkd" in card.content) is not with_code
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(scripts)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] in ("blue", "green", "red")


def test_a_run_without_a_report_or_arm_is_refused_with_the_way_out(finished_run: Path, tmp_path: Path):
    with pytest.raises(HubError, match=r"no arm 'kd', only e2e, m2mkd"):
        render_card(finished_run, "kd", "alice/tiny")
    with pytest.raises(HubError, match=f"m2mkd report {tmp_path}"):
        render_card(tmp_path, "m2mkd", "alice/tiny")
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(HubError, match="is damaged"):
        render_card(tmp_path, "m2mkd", "alice/tiny")
