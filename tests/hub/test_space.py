"""`m2mkd push --space`: the files of a demo, what its page computes, and the page in a browser."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
from local_hub import LocalHub
from PIL import Image
from testing_utils import nac, vmoe
from transformers import AutoImageProcessor
from typer.testing import CliRunner

from m2mkd.cli import app
from m2mkd.distillation.load import load_network
from m2mkd.hub.space import space_files
from m2mkd.hub.space_app import _DIALS, Demo


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(autouse=True)
def some_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files name the installed version of gradio; only the page itself needs the package."""
    version = importlib.metadata.version
    found = {"gradio": "6.31.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found.get(name) or version(name))


@pytest.fixture
def space(finished_run: Path, tmp_path: Path) -> Path:
    out = tmp_path / "demo"
    command = ["push", str(finished_run), "--repo-id", "alice/demo", "--space", "--with-images", "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0 and "Nothing was sent." in result.output, result.output
    return out


def test_the_files(finished_run: Path, space: Path) -> None:
    names = {path.relative_to(space).as_posix() for path in space.rglob("*") if path.is_file()}
    assert {"README.md", "app.py", "overlay.py", "requirements.txt", "settings.json", "examples/0.png"} < names
    assert {"model/modeling_vmoe.py", "model/model.safetensors", "teacher/model.safetensors"} < names
    assert "m2mkd." not in (space / "app.py").read_text() + (space / "overlay.py").read_text()
    assert str(finished_run) not in "".join(path.read_text() for path in space.glob("*.*"))
    assert not any(name.startswith("examples") for name in space_files(finished_run, "m2mkd"))
    again = CliRunner().invoke(app, ["push", str(finished_run), "--repo-id", "a/b", "--out", str(space)])
    assert again.exit_code == 1 and "already exists" in again.output


def test_the_page_says_what_the_models_say(finished_run: Path, space: Path) -> None:
    demo, image = Demo(space), Image.open(space / "examples" / "0.png")
    classes, taught, shown = demo.classify(image, *(slider["value"] for slider in demo.sliders))
    for said, folder in ((classes, finished_run / "arms" / "m2mkd"), (taught, finished_run / "teacher")):
        model, processor = load_network(folder).eval(), AutoImageProcessor.from_pretrained(folder)
        with torch.no_grad():
            logits = model(**processor(image, return_tensors="pt")).logits[0]
        best = logits.softmax(dim=-1)
        assert said == pytest.approx(
            {model.config.id2label[label]: float(p) for label, p in enumerate(best)}, abs=1e-6
        )
    assert [text.partition(",")[0] for _, text in shown] == [
        f"layer {layer}" for layer in demo.model.config.moe_layers
    ]


def test_the_dial_of_a_vmoe() -> None:
    model = vmoe(capacity_factor=1.5, batch_prioritized_routing=True)
    (number, room), adjusted = _DIALS["vmoe"](model)
    assert (number["value"], number["maximum"], room["value"]) == (2, 4, 1.5)
    config = adjusted(1.0, 0.5).config
    assert (config.num_experts_per_tok, config.capacity_factor, config.batch_prioritized_routing) == (1, 0.5, True)
    config = adjusted(3.0, 0).config
    assert (config.num_experts_per_tok, config.capacity_factor, config.batch_prioritized_routing) == (3, None, False)
    assert [own["label"] for own in _DIALS["vmoe"](vmoe(router_type="soft", num_slots=1))[0]] == []


def test_the_dial_of_a_nac() -> None:
    model = nac()
    (slider,), adjusted = _DIALS["nac"](model)
    assert adjusted(slider["value"]) is model
    assert adjusted(2).config.num_mediator_latents == 2 < slider["maximum"] == model.config.num_mediator_latents


def test_there_and_back(finished_run: Path, hub: LocalHub) -> None:
    result = CliRunner().invoke(app, ["push", str(finished_run), "--repo-id", "alice/demo", "--space"])
    assert result.exit_code == 0 and f"Pushed to {hub.url}/spaces/alice/demo (private)." in result.output, (
        result.output
    )
    repo = hub.repos["alice/demo"]
    assert repo.sdk == "gradio" and repo.private
    assert repo.files.keys() == space_files(finished_run, "m2mkd").keys()
    assert json.loads(repo.files["settings.json"])["teacher"] == "teacher"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_app_in_a_browser(space: Path, tmp_path: Path) -> None:
    gradio_client = pytest.importorskip("gradio_client")
    pytest.importorskip("gradio")
    address = "http://127.0.0.1:17871"
    environment = {**os.environ, "GRADIO_SERVER_PORT": "17871", "GRADIO_ANALYTICS_ENABLED": "False"}
    process = subprocess.Popen([sys.executable, "app.py"], cwd=space, env=environment)
    try:
        for _ in range(120):
            try:
                assert urlopen(address, timeout=5).status == 200
                break
            except (URLError, TimeoutError):
                time.sleep(1)
        client = gradio_client.Client(address, verbose=False)
        image = gradio_client.handle_file(str(space / "examples" / "0.png"))
        sliders = Demo(space).sliders
        classes, taught, shown = client.predict(image, *(own["value"] for own in sliders), api_name="/classify")
        assert classes["label"] and taught["label"] and len(shown) == 2
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000")
        command = [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", address]
        page = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
        assert all(text in page for text in ("Classify", "Teacher", *(own["label"] for own in sliders)))
    finally:
        process.terminate()
        process.wait()
