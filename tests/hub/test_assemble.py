"""`m2mkd assemble`: a student from folders of pairs, here and on a Hub on this machine."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from local_hub import LocalHub
from safetensors.torch import load_file
from testing_utils import assert_equal, nac, vmoe
from transformers import AutoConfig, AutoModelForImageClassification, pipeline
from typer.testing import CliRunner, Result

from m2mkd import VMoEForImageClassification, split_into_stages
from m2mkd.cli import app
from m2mkd.distillation.pair_folder import load_stage, load_stitches, save_pair
from m2mkd.distillation.stitched_stage import StitchedStage
from m2mkd.errors import HubError, PairFileError
from m2mkd.hub import requests as hub_module
from m2mkd.hub.assemble import assemble, pair_folders
from m2mkd.hub.push import files_to_push, push


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "WAITS", (0.0, 0.0))


def cli(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["assemble", *map(str, arguments)])


def check_student(out: Path, run: Path) -> None:
    """Every tensor is that of its module."""
    tensors = [load_file(run / "pairs" / str(index) / "model.safetensors") for index in (0, 1)]
    model = AutoModelForImageClassification.from_pretrained(out)
    assert type(model) is VMoEForImageClassification
    assert_equal(model.state_dict(), {**tensors[0], **tensors[1]})


def vmoe_of(run: Path) -> VMoEForImageClassification:
    """The run's student with other weights."""
    return VMoEForImageClassification(AutoConfig.from_pretrained(run / "pairs" / "0")).eval()


class TestSources:
    def test_a_run_or_its_pairs(self, finished_run: Path):
        pairs = [finished_run / "pairs" / str(index) for index in (0, 1)]
        assert pair_folders(str(finished_run)) == pair_folders(str(finished_run / "pairs")) == pairs
        assert pair_folders(str(pairs[1])) == [pairs[1]]

    def test_a_folder_without_pairs(self, finished_run: Path):
        with pytest.raises(HubError, match="arms/m2mkd has no pairs"):
            pair_folders(str(finished_run / "arms" / "m2mkd"))

    @pytest.mark.parametrize("source", ["nothing", "/nothing/here", "user/name/../../etc"])
    def test_neither_folder_nor_id(self, source: str):
        with pytest.raises(HubError, match="neither a local folder nor an id"):
            pair_folders(source)


class TestAssemble:
    def test_a_student_from_a_run(self, finished_run: Path, tmp_path: Path):
        done = cli(tmp_path / "student", finished_run)
        assert done.exit_code == 0, done.output
        assert done.output == f"VMoEForImageClassification of 2 modules is in {tmp_path / 'student'}.\n"
        check_student(tmp_path / "student", finished_run)
        classify = pipeline("image-classification", model=str(tmp_path / "student"))
        assert classify.model.config.id2label == {0: "blue", 1: "green", 2: "red"}

    def test_stitches_can_be_kept_between_the_modules(self, finished_run: Path, tmp_path: Path):
        assert cli(tmp_path / "student", finished_run, "--keep-stitches").exit_code == 0
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "student").eval()
        stages = split_into_stages(vmoe_of(finished_run), [1, 1])
        hidden_states = pixel_values = torch.randn(2, 3, 8, 8)
        for stage in stages:
            folder = finished_run / "pairs" / str(stage.index)
            load_stage(stage, folder)
            pair = StitchedStage(stage, model.config.stitch_size).eval()
            load_stitches(pair, folder)
            hidden_states, _ = pair(hidden_states)
        assert torch.equal(model(pixel_values).logits, hidden_states)

    def test_a_nac_has_no_place_for_stitches(self, tmp_path: Path):
        student = nac()
        for stage in split_into_stages(student, [1] * (student.config.num_hidden_layers + 2)):
            save_pair(StitchedStage(stage.distilled(), 12, "linear"), tmp_path / "pairs" / str(stage.index), 12)
        with pytest.raises(PairFileError, match="A nac has no place for stitches"):
            assemble(tmp_path / "student", [str(tmp_path / "pairs")], keep_stitches=True)
        assert not (tmp_path / "student").exists()

    def test_modules_of_several_places_in_any_order(self, finished_run: Path, tmp_path: Path):
        elsewhere = shutil.copytree(finished_run / "pairs" / "0", tmp_path / "first")
        assemble(tmp_path / "student", [str(finished_run / "pairs" / "1"), str(elsewhere)])
        check_student(tmp_path / "student", finished_run)

    def test_contracts_that_do_not_match_are_refused(self, finished_run: Path, tmp_path: Path):
        other = shutil.copytree(finished_run / "pairs" / "1", tmp_path / "other")
        contract = json.loads((other / "pair.json").read_text())
        (other / "pair.json").write_text(json.dumps({**contract, "teacher_sha256": "0" * 64}))
        first = finished_run / "pairs" / "0"
        done = cli(tmp_path / "student", first, other)
        assert done.exit_code == 1 and not (tmp_path / "student").exists()
        for part in ("`teacher_sha256`", str(first / "pair.json"), str(other / "pair.json")):
            assert part in done.output

    @pytest.mark.parametrize("name", ["pair.json", "config.json", "model.safetensors"])
    def test_a_damaged_pair_is_to_be_made_or_fetched_again(self, finished_run: Path, tmp_path: Path, name: str):
        other = shutil.copytree(finished_run / "pairs" / "1", tmp_path / "other")
        (other / name).write_text("{")
        done = cli(tmp_path / "student", finished_run / "pairs" / "0", other)
        assert done.exit_code == 1 and f"{other / name} is damaged" in done.output
        assert f"Delete {other}, then run its recipe again or fetch this pair again." in done.output

    def test_a_pair_twice_or_none(self, finished_run: Path, tmp_path: Path):
        with pytest.raises(PairFileError, match="both have `index` 0"):
            assemble(tmp_path / "student", [str(finished_run), str(finished_run / "pairs" / "0")])
        with pytest.raises(PairFileError, match=r"missing: \[1\]"):
            assemble(tmp_path / "student", [str(finished_run / "pairs" / "0")])

    def test_tensors_that_are_not_those_of_the_contract_are_refused(self, finished_run: Path, tmp_path: Path):
        pairs = shutil.copytree(finished_run / "pairs", tmp_path / "pairs")
        shutil.copy(pairs / "1" / "model.safetensors", pairs / "0" / "model.safetensors")
        with pytest.raises(PairFileError, match="model.safetensors does not fit; missing: "):
            assemble(tmp_path / "student", [str(pairs)])
        assert not (tmp_path / "student").exists()

    def test_a_folder_that_is_there_is_not_touched(self, finished_run: Path, tmp_path: Path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.tex").touch()
        with pytest.raises(HubError, match="already exists and is not empty"):
            assemble(tmp_path / "mine", [str(finished_run)])

    def test_what_nobody_knows_is_said(self, tmp_path: Path):
        # no hashes, as in converted modules, and no image processor
        for stage in split_into_stages(vmoe(), [2, 2]):
            save_pair(StitchedStage(stage, 12), tmp_path / "pairs" / str(stage.index), 12)
        said = "\n".join(assemble(tmp_path / "student", [str(tmp_path / "pairs")]))
        assert said.count("has no `teacher_sha256`") == said.count("has no `meta_sha256`") == 2
        assert "No module has a preprocessor_config.json" in said

    def test_a_nac_says_what_its_modules_do_not_hold(self, tmp_path: Path):
        model = nac()
        for stage in split_into_stages(model, [1] * (model.config.num_hidden_layers + 2)):
            save_pair(StitchedStage(stage.distilled(), 12, "linear"), tmp_path / "pairs" / str(stage.index), 12)
        said = "\n".join(assemble(tmp_path / "student", [str(tmp_path)]))
        assert "re-initialized: " in said and "latents" in said
        student = AutoModelForImageClassification.from_pretrained(tmp_path / "student")
        saved = load_file(tmp_path / "pairs" / "1" / "model.safetensors")
        assert_equal({name: student.state_dict()[name] for name in saved}, saved)


class TestFromTheHub:
    @pytest.fixture(autouse=True)
    def pushed(self, finished_run: Path, hub: LocalHub) -> None:
        push(files_to_push(finished_run, "m2mkd", "alice/tiny"), "alice/tiny", "first")
        hub.requests.clear()

    def test_by_id_the_modules_alone_are_fetched(self, finished_run: Path, hub: LocalHub, tmp_path: Path):
        assert cli(tmp_path / "student", "alice/tiny").exit_code == 0
        check_student(tmp_path / "student", finished_run)
        fetched = [line.rpartition("/resolve/")[2] for line in hub.requests if line.startswith("GET /alice")]
        assert fetched and all("/pairs/" in line for line in fetched)

    def test_one_from_here_and_one_from_there(self, finished_run: Path, hub: LocalHub, tmp_path: Path):
        assemble(tmp_path / "student", [str(finished_run / "pairs" / "0"), "alice/tiny/pairs/1"])
        check_student(tmp_path / "student", finished_run)
        assert not any("pairs/0" in line for line in hub.requests)

    def test_what_is_not_there(self, hub: LocalHub, tmp_path: Path):
        for source in ("alice/nothing", "runs/typo"):
            done = cli(tmp_path / "student", source)
            assert done.exit_code == 1 and f"{source} is not a local folder, and on the Hub: " in done.output
        done = cli(tmp_path / "student", "alice/tiny/arms")
        assert done.exit_code == 1 and "alice/tiny/arms has no pairs" in done.output

    def test_without_a_network(self, hub: LocalHub, tmp_path: Path):
        hub.fail("GET", "/api/models/", 0, times=100)
        done = cli(tmp_path / "student", "alice/tiny")
        assert done.exit_code == 1 and "cannot be reached" in done.output
