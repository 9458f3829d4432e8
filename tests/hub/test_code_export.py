"""The exported code, loaded in a process that has torch and transformers but not this package."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bare_site import torch_and_transformers_alone
from testing_utils import images, nac, vmoe

from m2mkd.errors import HubError
from m2mkd.hub.code_export import export_hub_code


READER = """
import json, sys

sys.path.append(sys.argv.pop(1))
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

said = {}
try:
    import m2mkd
except ModuleNotFoundError:
    said["no m2mkd"] = True
pixel_values = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    try:
        AutoModelForImageClassification.from_pretrained(folder)
    except ValueError as error:
        said["without the flag " + folder] = str(error)
    said["ran " + folder] = any(name.startswith("transformers_modules") for name in sys.modules)
for folder in sys.argv[2:]:
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    model.save_pretrained(folder + "-again")
    again = AutoModelForImageClassification.from_pretrained(folder + "-again", trust_remote_code=True).eval()
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    said["classes " + folder] = [type(item).__name__ for item in (model, base, config)]
    with torch.no_grad():
        torch.save([model(pixel_values).logits, again(pixel_values).logits], folder + "/logits.pt")
# the question whether to run the code stands on the line before
print("\\n" + json.dumps(said))
"""
MODELS = {"vmoe": vmoe, "nac": nac}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved model of each kind, with its code."""
    root = tmp_path_factory.mktemp("models")
    for name, build in MODELS.items():
        model = build().eval()
        model.save_pretrained(root / name)
        with torch.no_grad():
            torch.save(model(images()).logits, root / f"{name}.pt")
        export_hub_code(root / name)
    return {name: root / name for name in MODELS}


@pytest.fixture(scope="module")
def reader(folders: dict[str, Path]) -> dict[str, Any]:
    """What a process without this package says of both folders."""
    root = folders["vmoe"].parent
    torch.save(images(), root / "pixels.pt")
    environment = {**os.environ, "HF_HOME": str(root / "home")}
    site = torch_and_transformers_alone(root / "site")
    # -I and -S: no PYTHONPATH, no current folder, no site-packages
    arguments = [str(site), str(root / "pixels.pt"), *map(str, folders.values())]
    command = [sys.executable, "-I", "-S", "-c", READER, *arguments]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", MODELS)
class TestWithoutThePackage:
    def test_the_logits_are_the_same(self, name: str, folders: dict[str, Path], reader: dict[str, Any]) -> None:
        assert reader["no m2mkd"]
        expected = torch.load(folders[name].with_suffix(".pt"))
        for logits in torch.load(folders[name] / "logits.pt"):
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)

    def test_every_auto_class_finds_ours(self, name: str, folders: dict[str, Path], reader: dict[str, Any]) -> None:
        prefix = {"vmoe": "VMoE", "nac": "NAC"}[name]
        expected = [f"{prefix}ForImageClassification", f"{prefix}Model", f"{prefix}Config"]
        assert reader[f"classes {folders[name]}"] == expected

    def test_nothing_runs_without_the_flag(self, name: str, folders: dict[str, Path], reader: dict[str, Any]) -> None:
        assert "trust_remote_code=True" in reader[f"without the flag {folders[name]}"]
        assert not reader[f"ran {folders[name]}"]


@pytest.mark.parametrize("name", MODELS)
def test_transformers_model_linter_has_nothing_to_say(name: str, folders: dict[str, Path]) -> None:
    command = [str(Path(sys.executable).parent / "mlinter"), "--no-cache", "--no-progress", "."]
    done = subprocess.run(command, cwd=folders[name], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_model_takes_along_what_it_imports_and_no_more(folders: dict[str, Path]) -> None:
    sources = {path.name for path in folders["vmoe"].glob("*.py")}
    assert sources == {
        "configuration_vmoe.py",
        "modeling_vmoe.py",
        "router_losses.py",
        "stitches.py",
        "vmoe_embeddings.py",
        "vmoe_experts.py",
        "vmoe_outputs.py",
        "vmoe_routers.py",
    }
    for folder in folders.values():
        text = "\n".join(path.read_text() for path in folder.glob("*.py"))
        assert "from m2mkd." not in text and "\nimport m2mkd" not in text


def test_the_package_itself_still_loads_the_folder(folders: dict[str, Path]) -> None:
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(folders["vmoe"])
    assert type(model) is type(vmoe())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json is missing"),
        ("{", "is damaged"),
        ("[]", "not a JSON object"),
        ('{"model_type": "vit"}', "`model_type` 'vit'. Code can be exported only for nac and vmoe"),
    ],
)
def test_a_folder_without_a_model_of_ours_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(HubError, match=message):
        export_hub_code(tmp_path)
    assert not list(tmp_path.glob("*.py"))
