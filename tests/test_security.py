"""What SECURITY.md promises."""

import ast
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from sources import SOURCES, tree_of
from testing_utils import vit
from tiny_run import published, recipe_content
from typer.testing import CliRunner
from yaml import safe_dump

from m2mkd.cli import app
from m2mkd.data.config import DataConfig
from m2mkd.data.imagefolder import class_files
from m2mkd.data.processing import PixelTransform
from m2mkd.distillation.load import load_network, load_network_config
from m2mkd.errors import DataError, HubError, RecipeError, StageError
from m2mkd.experiment.recipe_file import parse_recipe
from m2mkd.hub.assemble import assemble
from m2mkd.hub.push import files_to_push


TOKEN = "hf_marked_token"


class Marker:
    """Unpickled by a careless reader, it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "run")


class TestCode:
    def test_every_torch_load_reads_only_weights_and_nothing_is_trusted(self) -> None:
        calls = [node for path in SOURCES for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
        loads = [call for call in calls if ast.unparse(call.func) == "torch.load"]
        assert loads and all("weights_only=True" in ast.unparse(call) for call in loads)
        wanted = [call for call in calls if ast.unparse(call.func).endswith(("AutoConfig.from_pretrained",))]
        assert wanted and all("trust_remote_code=False" in ast.unparse(call) for call in wanted)

    def test_a_pickle_is_not_run(self, tmp_path: Path) -> None:
        torch.save({"model": Marker(tmp_path / "ran")}, tmp_path / "x.pth")
        (tmp_path / "c.json").write_text("{}")
        words = ["convert", str(tmp_path / "x.pth"), str(tmp_path / "out"), "--kind", "vit", "--config"]
        done = CliRunner().invoke(app, [*words, str(tmp_path / "c.json")])
        assert done.exit_code == 1 and not (tmp_path / "ran").exists() and done.stderr.startswith("Error: ")
        folder = published(tmp_path / "model", vit())
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Marker(tmp_path / "ran")))
        with pytest.raises(StageError):
            load_network(folder)
        assert not (tmp_path / "ran").exists()

    def test_code_of_a_repository_is_not_run(self, tmp_path: Path) -> None:
        code = "raise SystemExit('ran')"
        (tmp_path / "code.py").write_text(code)
        auto = {"AutoConfig": "code.C", "AutoModelForImageClassification": "code.M"}
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "other", "auto_map": auto}))
        for load in (load_network, load_network_config):
            with pytest.raises(StageError, match="needs code from its repository, and m2mkd runs no such code"):
                load(tmp_path)


class TestPaths:
    def test_a_link_out_of_a_pair_is_not_followed(self, finished_run: Path, tmp_path: Path) -> None:
        shutil.copytree(finished_run / "pairs", tmp_path / "pairs")
        (tmp_path / "secret").write_text("{}")
        file = tmp_path / "pairs" / "0" / "preprocessor_config.json"
        file.unlink()
        file.symlink_to(tmp_path / "secret")
        with pytest.raises(HubError, match="preprocessor_config.json leads out of .*remove the link"):
            assemble(tmp_path / "out", [str(tmp_path / "pairs")])

    def test_a_link_out_of_an_arm_is_not_pushed(self, finished_run: Path, tmp_path: Path) -> None:
        run = shutil.copytree(finished_run, tmp_path / "run")
        (tmp_path / "x").write_bytes(b"secret")
        (run / "arms" / "e2e" / "more.safetensors").symlink_to(tmp_path / "x")
        with pytest.raises(HubError, match="more.safetensors leads out of"):
            files_to_push(run, "e2e", "user/name")

    @pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors"])
    def test_weights_outside_of_a_model_are_not_read(self, tmp_path: Path, name: str) -> None:
        folder = published(tmp_path / "model", vit())
        shutil.move(folder / "model.safetensors", tmp_path / "x.safetensors")
        index = {"metadata": {}, "weight_map": {key: name for key in vit().state_dict()}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(StageError, match="leads out of"):
            load_network(folder)

    @pytest.mark.parametrize("name", ["../x", "/x", ".x", "", "a\nb", "x" * 101])
    def test_no_name_in_a_recipe_leaves_the_folder_of_its_run(self, tmp_path: Path, name: str) -> None:
        content = recipe_content(tmp_path)
        content["data"][name] = content["data"]["iid"]
        with pytest.raises(RecipeError, match="a name must be that of one folder"):
            parse_recipe(content, "x")
        with pytest.raises(RecipeError):
            parse_recipe(recipe_content(tmp_path, arms=[{name: {"init": "random"}}]), "x")


class TestTokens:
    def test_a_recipe_holds_none(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="`hub_token` would be written .*HF_TOKEN") as caught:
            parse_recipe(recipe_content(tmp_path, training={"hub_token": TOKEN}), "x")
        assert TOKEN not in str(caught.value)

    def test_no_command_writes_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        (tmp_path / "recipe.yaml").write_text(safe_dump(recipe_content(tmp_path, arms=["m2mkd"])))
        run, images = str(tmp_path / "run"), f"imagefolder:{tmp_path / 'test'}"
        model, said = f"{run}/arms/m2mkd", ""
        for words in (
            ["run", f"{tmp_path}/recipe.yaml", "--training.num_train_epochs", "1"],
            ["run", f"{tmp_path}/recipe.yaml", "--plan"],
            ["slurm", f"{tmp_path}/recipe.yaml"],
            ["report", run],
            ["assemble", f"{tmp_path}/out", run],
            ["evaluate", model, "--data", images],
            ["few-shot", model, "--data", images, "--ways", "2", "--shots", "1", "--episodes", "1"],
            ["inspect", model, f"{tmp_path}/test/red/0.png", "--out", f"{tmp_path}/x.png"],
            ["upcycle", f"{run}/teacher", f"{tmp_path}/up"],
            ["push", run, "--repo-id", "user/name", "--dry-run", "--with-code"],
        ):
            done = CliRunner().invoke(app, words)
            assert done.exit_code in (0, 1), (words, done.output)
            said += done.output
        assert TOKEN not in said
        written = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert written and not [path for path in written if TOKEN.encode() in path.read_bytes()]


class TestImages:
    def test_a_strip_does_not_grow_without_bounds(self) -> None:
        from PIL import Image

        config = DataConfig(source="x", image_size=224, center_crop=0.875)
        with pytest.raises(DataError, match="30000 x 1 pixels would become 7680000 x 256"):
            PixelTransform(config)(Image.new("RGB", (30_000, 1)))

    def test_links_in_a_circle_end(self, tmp_path: Path) -> None:
        os.symlink(tmp_path, tmp_path / "again")
        with pytest.raises(DataError, match="again leads back to a folder that it is in: remove it"):
            class_files(str(tmp_path), {".png"})
