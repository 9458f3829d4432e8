"""`m2mkd push` to a Hub on this machine: what goes there, what comes back, what is refused."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bare_site import torch_and_transformers_alone
from huggingface_hub import ModelCard, constants
from local_hub import LocalHub, Repo
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from testing_utils import code_blocks, commands
from tiny_run import CLASS_NAMES
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
from typer.testing import CliRunner, Result

from m2mkd.cli import app
from m2mkd.distillation.pair_folder import read_contract, tensors_sha256
from m2mkd.errors import HubError, PairFileError, RunError
from m2mkd.hub import requests as hub_module
from m2mkd.hub.code_export import export_hub_code
from m2mkd.hub.push import files_to_push, print_files, push


MODEL = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
PAIR = {"config.json", "model.safetensors", "pair.json", "preprocessor_config.json", "stitches.safetensors"}
PAIRS = {f"pairs/{index}/{name}" for index in (0, 1) for name in PAIR}
CODE = {"configuration_vmoe.py", "modeling_vmoe.py"}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "WAITS", (0.0, 0.0))


def cli(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


class TestFilesToPush:
    def test_a_distilled_student_takes_its_modules_along(self, finished_run: Path):
        assert set(files_to_push(finished_run, "m2mkd", "alice/tiny")) == MODEL | PAIRS
        assert set(files_to_push(finished_run, "e2e", "alice/tiny")) == MODEL

    def test_each_module_says_what_it_was_made_with(self, finished_run: Path):
        hashes = {
            f"{name}_sha256": tensors_sha256(load_file(finished_run / folder / "model.safetensors"))
            for name, folder in (("teacher", "teacher"), ("meta", "meta"))
        }
        for index in (0, 1):
            contract = read_contract(finished_run / "pairs" / str(index))
            assert contract.items() >= {"index": index, "num_pairs": 2, "stitch_size": 12, **hashes}.items()
            assert list(contract["stitches"]) and None not in hashes.values()

    def test_with_its_code(self, finished_run: Path):
        files = files_to_push(finished_run, "e2e", "alice/tiny", with_code=True)
        assert set(files) >= MODEL | CODE and all(name.endswith(".py") for name in set(files) - MODEL)
        assert "AutoModelForImageClassification" in json.loads(files["config.json"])["auto_map"]
        # the folder of the run stays as it is
        assert "auto_map" not in (finished_run / "arms" / "e2e" / "config.json").read_text()

    def test_without_it_nothing_names_code_that_is_not_there(self, finished_run: Path, tmp_path: Path):
        run = shutil.copytree(finished_run, tmp_path / "run")
        export_hub_code(run / "arms" / "e2e")
        files = files_to_push(run, "e2e", "alice/tiny")
        assert set(files) == MODEL and "auto_map" not in json.loads(files["config.json"])

    def test_no_path_of_this_machine_goes_along(self, finished_run: Path):
        files = files_to_push(finished_run, "m2mkd", "alice/tiny")
        contents = {name: item if isinstance(item, bytes) else item.read_bytes() for name, item in files.items()}
        assert not [name for name, content in contents.items() if str(finished_run.parent).encode() in content]

    def test_what_is_not_finished_is_refused(self, finished_run: Path, tmp_path: Path):
        with pytest.raises(HubError, match="no arm 'kd', only e2e, m2mkd"):
            files_to_push(finished_run, "kd", "alice/tiny")
        with pytest.raises(RunError, match="is not the folder of a run"):
            files_to_push(tmp_path, "m2mkd", "alice/tiny")
        (tmp_path / "recipe.json").touch()
        with pytest.raises(HubError, match="report.json is missing.*Finish the run"):
            files_to_push(tmp_path, "m2mkd", "alice/tiny")
        run = shutil.copytree(finished_run, tmp_path / "run")
        (run / "pairs" / "1" / "train_results.json").unlink()
        with pytest.raises(HubError, match="pairs/1 is not finished"):
            files_to_push(run, "m2mkd", "alice/tiny")
        (run / "arms" / "e2e" / "train_results.json").unlink()
        with pytest.raises(HubError, match="arms/e2e is not finished"):
            files_to_push(run, "e2e", "alice/tiny")

    def test_modules_of_two_distillations_are_refused(self, finished_run: Path, tmp_path: Path):
        run = shutil.copytree(finished_run, tmp_path / "run")
        contract = run / "pairs" / "1" / "pair.json"
        contract.write_text(json.dumps({**json.loads(contract.read_text()), "meta_sha256": "0" * 64}))
        with pytest.raises(PairFileError, match="`meta_sha256`"):
            files_to_push(run, "m2mkd", "alice/tiny")


def test_the_table_names_every_file_and_its_size(finished_run: Path):
    console = Console(file=io.StringIO(), width=100)
    files = files_to_push(finished_run, "m2mkd", "alice/tiny")
    print_files(files, console)
    text = console.file.getvalue()
    assert all(name in text for name in files) and f"{len(files)} files" in text


class TestPush:
    def test_there_and_back(self, finished_run: Path, hub: LocalHub, tmp_path: Path):
        done = cli("push", finished_run, "--arm", "m2mkd", "--repo-id", "alice/tiny")
        assert done.exit_code == 0, done.output
        assert f"{hub.url}/alice/tiny (private)" in done.output
        repo = hub.repos["alice/tiny"]
        assert repo.private and set(repo.files) == MODEL | PAIRS
        # all at once
        assert len(repo.messages) == 1

        ours = AutoModelForImageClassification.from_pretrained(finished_run / "arms" / "m2mkd").eval()
        model = AutoModelForImageClassification.from_pretrained("alice/tiny").eval()
        pixels = torch.randn(2, 3, 8, 8)
        with torch.no_grad():
            assert torch.equal(model(pixels).logits, ours(pixels).logits)
        Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
        classify = pipeline("image-classification", model="alice/tiny")
        assert {item["label"] for item in classify(str(tmp_path / "red.png"))} == set(CLASS_NAMES)

    def test_the_card_is_of_the_repository(self, finished_run: Path, hub: LocalHub):
        push(files_to_push(finished_run, "m2mkd", "alice/tiny", license="mit"), "alice/tiny", "first", public=True)
        card = ModelCard.load("alice/tiny")
        assert 'model="alice/tiny"' in card.text and "m2mkd assemble student alice/tiny" in card.text
        assert card.data.license == "mit" and card.data.model_name == "tiny" and card.data.eval_results
        assert not hub.repos["alice/tiny"].private

    def test_a_dry_run_asks_nobody(self, finished_run: Path, hub: LocalHub):
        done = cli("push", finished_run, "--repo-id", "alice/tiny", "--with-code", "--dry-run")
        assert done.exit_code == 0 and "Nothing was sent" in done.output and "modeling_vmoe.py" in done.output
        assert hub.requests == [] and hub.repos == {}

    def test_again_into_the_same_repository(self, finished_run: Path, hub: LocalHub):
        files = files_to_push(finished_run, "e2e", "alice/tiny")
        assert push(files, "alice/tiny", "first") == push(files, "alice/tiny", "second")

    @pytest.mark.parametrize(
        ("method", "part", "status"),
        [
            ("PUT", "/blobs/", 503),
            ("POST", "/api/repos/create", 503),
            ("POST", "/preupload/", 0),
            ("POST", "/commit/", 502),
            ("POST", "/commit/", 0),
        ],
    )
    def test_a_passing_failure_is_tried_again(
        self, finished_run: Path, hub: LocalHub, method: str, part: str, status: int
    ):
        hub.fail(method, part, status)
        push(files_to_push(finished_run, "e2e", "alice/tiny"), "alice/tiny", "first")
        assert set(hub.repos["alice/tiny"].files) == MODEL and len(hub.repos["alice/tiny"].messages) == 1
        assert hub.failures[0].times == 0

    def test_a_lasting_failure_leaves_nothing_half_written(self, finished_run: Path, hub: LocalHub):
        hub.fail("POST", "/commit/", 503, times=100)
        done = cli("push", finished_run, "--repo-id", "alice/tiny")
        assert done.exit_code == 1 and "503" in done.output and "Nothing was changed" in done.output
        assert hub.repos["alice/tiny"].files == {}

    def test_a_transfer_that_breaks_off_without_an_answer(
        self, finished_run: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
    ):
        # as Xet does
        def break_off(*_: object, **__: object) -> None:
            raise RuntimeError("stream closed")

        monkeypatch.setattr("huggingface_hub.HfApi.create_commit", break_off)
        done = cli("push", finished_run, "--repo-id", "alice/tiny")
        assert done.exit_code == 1 and "cannot be reached (RuntimeError: stream closed)" in done.output

    def test_without_permission(self, finished_run: Path, hub: LocalHub):
        done = cli("push", finished_run, "--repo-id", "bob/tiny")
        assert (
            done.exit_code == 1 and "not allowed to write to bob/tiny (403" in done.output and "hf auth" in done.output
        )
        # a repository that alice can read
        hub.repos["bob/tiny"] = Repo(private=False)
        done = cli("push", finished_run, "--repo-id", "bob/tiny", "--public")
        assert done.exit_code == 1 and "not allowed to write to bob/tiny (403" in done.output
        assert hub.repos["bob/tiny"].files == {}

    def test_a_namespace_that_is_not_there(self, finished_run: Path, hub: LocalHub):
        done = cli("push", finished_run, "--repo-id", "nobody/tiny")
        assert done.exit_code == 1 and "nobody/tiny does not exist" in done.output

    @pytest.mark.parametrize("token", ["hf_stranger", None])
    def test_a_token_that_is_not_known_is_not_printed(
        self, finished_run: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch, token: str | None
    ):
        monkeypatch.delenv("HF_TOKEN")
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        done = cli("push", finished_run, "--repo-id", "alice/tiny")
        assert done.exit_code == 1 and "hf auth login" in done.output and "hf_stranger" not in done.output
        assert hub.repos == {}

    def test_no_repository_that_all_may_read_unless_one_says_so(self, finished_run: Path, hub: LocalHub):
        hub.repos["alice/tiny"] = Repo(private=False)
        done = cli("push", finished_run, "--repo-id", "alice/tiny")
        assert done.exit_code == 1 and "Give --public" in done.output and hub.repos["alice/tiny"].files == {}
        assert cli("push", finished_run, "--repo-id", "alice/tiny", "--public").exit_code == 0

    def test_without_a_network(self, finished_run: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch):
        # nobody listens there
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        done = cli("push", finished_run, "--repo-id", "alice/tiny")
        assert done.exit_code == 1 and "(http://127.0.0.1:9) cannot be reached" in done.output
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE is set" in cli("push", finished_run, "--repo-id", "alice/tiny").output

    def test_no_id(self, finished_run: Path, hub: LocalHub):
        done = cli("push", finished_run, "--repo-id", "a b/c")
        assert done.exit_code == 1 and "user/name" in done.output


def test_test_images_go_along_only_if_asked(finished_run: Path):
    files = files_to_push(finished_run, "m2mkd", "alice/tiny", with_images=True)
    examples = {f"examples/{place}.png" for place in range(3)}
    assert set(files) == MODEL | PAIRS | examples | {"routing.png"}
    with Image.open(io.BytesIO(files["routing.png"])) as picture:
        assert picture.width > picture.height / 3
    card = ModelCard(files["README.md"].decode())
    assert {example["src"] for example in card.data.to_dict()["widget"]} == examples
    assert "](routing.png)" in card.text
    assert "](routing.png)" not in ModelCard(files_to_push(finished_run, "m2mkd", "a/b")["README.md"].decode()).text


def test_all_arms_in_a_collection(finished_run: Path, hub: LocalHub):
    command = ("push", finished_run, "--repo-id", "alice/tiny", "--collection")
    for _ in range(2):
        result = cli(*command)
        assert result.exit_code == 0, result.output
    assert f"Collected in {hub.url}/collections/alice/tiny" in result.output
    assert set(hub.repos) == {"alice/tiny-e2e", "alice/tiny-m2mkd"}
    collection = hub.collections["alice/tiny"]
    assert [item["id"] for item in collection["items"]] == ["alice/tiny-e2e", "alice/tiny-m2mkd"]
    assert collection["private"]
    assert cli(*command, "--arm", "e2e").exit_code == 2


class TestInOtherProcesses:
    """Pushed by the console script, loaded where this package is not; both know the Hub by their environment alone."""

    def process(self, hub: LocalHub, tmp_path: Path, *command: str | Path) -> str:
        environment = {**os.environ, **hub.environment(str(tmp_path / "hf"), "hf_alice")}
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "hf_alice" not in done.stdout + done.stderr
        return done.stdout

    def test_the_code_blocks_of_the_card_run_without_the_package(
        self, finished_run: Path, hub: LocalHub, tmp_path: Path
    ):
        command = ("push", finished_run, "--arm", "m2mkd", "--repo-id", "alice/tiny", "--with-code")
        said = self.process(hub, tmp_path, "-m", "m2mkd.cli", *command)
        assert f"Pushed to {hub.url}/alice/tiny (private)." in said
        card = hub.repos["alice/tiny"].files["README.md"].decode()

        Image.new("RGB", (8, 8), "red").save(tmp_path / "image.png")
        assert ["pip", "install", "torch", "transformers", "pillow"] in commands(card)
        scripts = code_blocks(card, "python")
        check = "\nimport json, sys\nassert 'm2mkd' not in sys.modules\nprint(json.dumps(logits.tolist()))"
        path = f"import sys\nsys.path.append({str(torch_and_transformers_alone(tmp_path / 'site'))!r})\n"
        (tmp_path / "reader.py").write_text(path + "\n".join(scripts) + check)
        # -I and -S: no PYTHONPATH, no current folder, no site-packages
        said = self.process(hub, tmp_path, "-I", "-S", "reader.py")
        logits = torch.tensor(json.loads(said.splitlines()[-1]))

        folder = finished_run / "arms" / "m2mkd"
        pixels = AutoImageProcessor.from_pretrained(folder)(Image.open(tmp_path / "image.png"), return_tensors="pt")
        with torch.no_grad():
            ours = AutoModelForImageClassification.from_pretrained(folder).eval()(**pixels).logits
        torch.testing.assert_close(logits, ours, rtol=0, atol=1e-6)
