"""Whole runs in miniature: order, skipping, interruption, damage, repetition."""

import json
import multiprocessing
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from testing_utils import assert_equal
from tiny_run import recipe_content, tiny_recipe, write_images
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainerCallback, pipeline
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from m2mkd.errors import DataError, PairFileError, RecipeError, RunError, StageError
from m2mkd.experiment import machine, runner
from m2mkd.experiment.one_writer import Writer, one_writer
from m2mkd.experiment.recipe_file import parse_recipe
from m2mkd.experiment.run_folder import lock_file
from m2mkd.files import write_json
from m2mkd.trainer.m2mkd_trainer import M2MKDTrainer


def tensors(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every weight file of a run by its path inside it."""
    return {str(path.relative_to(run)): load_file(path) for path in sorted(run.rglob("*.safetensors"))}


def files(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data of the tiny recipe and its finished run, all arms included. Not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    runner.run(tiny_recipe(folder, equal_compute=True, repeat_seeds=[5]))
    return folder


class TestRun:
    def test_every_phase_leaves_a_hugging_face_folder(self, finished: Path) -> None:
        run = finished / "run"
        for name in ("meta", "teacher", "arms/e2e", "arms/kd", "arms/m2mkd", "arms/e2e_equal_compute"):
            model = AutoModelForImageClassification.from_pretrained(run / name)
            processor = AutoImageProcessor.from_pretrained(run / name)
            pixels = processor(Image.new("RGB", (20, 10), "red"), return_tensors="pt")["pixel_values"]
            assert model(pixels).logits.shape == (1, 3)
            assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
        for pair in ("pairs/0", "pairs/1"):
            assert {"config.json", "model.safetensors", "stitches.safetensors", "pair.json"} <= {
                path.name for path in (run / pair).iterdir()
            }
        assert not [name for name in files(run) if ".work" in name or ".tmp" in name]

    def test_an_arm_works_in_a_pipeline(self, finished: Path) -> None:
        classify = pipeline("image-classification", model=str(finished / "run" / "arms" / "m2mkd"))
        answer = classify(str(finished / "test" / "red" / "0.png"))
        assert {entry["label"] for entry in answer} == {"blue", "green", "red"}

    def test_the_report_has_the_fields_of_the_design(self, finished: Path) -> None:
        report = json.loads((finished / "run" / "report.json").read_text())
        assert {"recipe", "seed", "device", "versions", "meta", "teacher", "arms"} <= report.keys()
        assert set(report["arms"]) == {"e2e", "kd", "m2mkd", "e2e_equal_compute", "kd_equal_compute"}
        for result in [report["meta"], report["teacher"], *report["arms"].values()]:
            assert {"iid", "ood", "train_seconds", "train_samples_seen", "parameters", "train_flops"} <= result.keys()
            assert result["iid"]["n"] == 9 and result["ood"]["n"] == 6
            assert 0 <= result["iid"]["accuracy"] <= 1
        assert (finished / "run" / "report.md").is_file() and (finished / "run" / "report.png").is_file()

    def test_equal_compute_gives_a_baseline_what_m2mkd_took_and_less_than_an_epoch_more(self, finished: Path) -> None:
        arms = json.loads((finished / "run" / "report.json").read_text())["arms"]
        for name in ("e2e", "kd"):
            longer = arms[f"{name}_equal_compute"]
            epoch = longer["train_flops"] / longer["epochs"]
            budget = arms["m2mkd"]["train_flops"]
            assert longer["epochs"] > arms[name]["epochs"]
            assert budget <= longer["train_flops"] * (1 + 1e-9) and longer["train_flops"] < budget + epoch

    def test_a_second_run_trains_nothing_and_changes_no_weights(
        self, finished: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = tensors(finished / "run")
        monkeypatch.setattr(M2MKDTrainer, "train", _forbidden)
        runner.run(tiny_recipe(finished, equal_compute=True, repeat_seeds=[5]))
        after = tensors(finished / "run")
        assert before.keys() == after.keys()
        for name in before:
            assert_equal(after[name], before[name])

    def test_repeated_seeds_share_the_teacher_and_differ_in_the_student(self, finished: Path) -> None:
        run = finished / "run"
        assert not (run / "seeds" / "5" / "teacher").exists()
        first = load_file(run / "pairs" / "0" / "model.safetensors")
        second = load_file(run / "seeds" / "5" / "pairs" / "0" / "model.safetensors")
        assert any(not torch.equal(first[name], second[name]) for name in first)

    def test_phases_side_by_side_leave_what_phases_one_by_one_do(
        self, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        runner.run(_copy_of(finished, tmp_path, equal_compute=True, repeat_seeds=[5], processes=3))
        found, expected = tensors(tmp_path / "run"), tensors(finished / "run")
        assert files(tmp_path / "run") == files(finished / "run")
        for name in expected:
            assert_equal(found[name], expected[name])
        for phase in ("teacher", "pairs/0", "seeds/5/arms/kd_equal_compute"):
            assert _log(tmp_path, phase) == _log(finished, phase)
        printed = capsys.readouterr().out
        assert "[seed 5] arm kd_equal_compute: 12 images" in printed and "phases side by side" in printed

    @pytest.mark.slow
    def test_a_run_that_fails_side_by_side_goes_on_one_by_one(self, finished: Path, tmp_path: Path) -> None:
        recipe = _copy_of(finished, tmp_path, without=["pairs", "arms"], processes=2)
        teacher = tmp_path / "run" / "teacher" / "model.safetensors"
        whole = teacher.read_bytes()
        teacher.write_bytes(whole[:-100])
        with pytest.raises(StageError, match="teacher cannot be loaded"):
            runner.run(recipe)
        assert not multiprocessing.active_children()
        teacher.write_bytes(whole)
        runner.run(recipe.model_copy(update={"processes": 1}))
        expected = tensors(finished / "run")
        for name, value in tensors(tmp_path / "run").items():
            assert_equal(value, expected[name])

    def test_a_baseline_that_takes_the_flops_of_m2mkd_anyway_is_not_trained_twice(
        self, finished: Path, tmp_path: Path
    ) -> None:
        finetune = {"data": "labelled", "training": {"num_train_epochs": 18}}
        recipe = _copy_of(
            finished, tmp_path, without=["arms"], finetune=finetune, arms=["kd", "m2mkd"], equal_compute=True
        )
        runner.run(recipe)
        run = tmp_path / "run"
        plain, twin = load_file(run / "arms/kd/model.safetensors"), run / "arms/kd_equal_compute"
        assert_equal(load_file(twin / "model.safetensors"), plain)
        report = json.loads((run / "report.json").read_text())
        assert report["arms"]["kd_equal_compute"]["same_as"] == "kd"
        assert report["arms"]["kd"]["train_flops"] >= report["arms"]["m2mkd"]["train_flops"]
        assert "kd_equal_compute: the model of kd" in (run / "report.md").read_text()

    @pytest.mark.parametrize(
        "threads, gpu, asked, processes",
        [(8, False, None, 6), (2, False, None, 2), (8, True, None, 1), (1, False, 4, 4)],
    )
    def test_phases_run_side_by_side_on_a_cpu_as_far_as_there_are_threads(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, gpu: bool, asked: int, processes: int
    ) -> None:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
        assert machine.num_processes(tiny_recipe(tmp_path, repeat_seeds=[1], processes=asked)) == processes

    def test_processes_that_share_each_phase_run_one_phase_at_a_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(machine, "PartialState", lambda: SimpleNamespace(num_processes=2))
        assert machine.num_processes(tiny_recipe(tmp_path)) == 1
        with pytest.raises(RunError, match="`processes` is 3, but 2 processes already share each phase"):
            runner.run(tiny_recipe(tmp_path, processes=3))

    def test_another_recipe_in_the_same_folder_is_refused_by_key(self, finished: Path) -> None:
        content = recipe_content(finished)
        content["training"]["learning_rate"] = 2e-3
        with pytest.raises(RunError, match=r"training.learning_rate: 0.001 → 0.002 \(.*teacher"):
            runner.run(parse_recipe(content, "changed"))

    def test_an_interrupted_run_says_what_it_keeps(
        self, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        recipe = _copy_of(finished, tmp_path, without=["kd"])
        (tmp_path / "run" / "arms" / ".kd.work" / "checkpoint-3").mkdir(parents=True)
        monkeypatch.setattr(runner, "run_tasks", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            runner.run(recipe)
        said = capsys.readouterr().out.splitlines()[-1]
        assert f"{tmp_path / 'run'} keeps arms/e2e, " in said and "arms/kd," not in said and "pairs/1" in said
        assert said.endswith("teacher, and the checkpoints of 1 unfinished phase.")

    @pytest.mark.parametrize(
        "phase",
        [
            *(pytest.param(phase, marks=pytest.mark.slow) for phase in ("meta", "teacher", "kd")),
            "teacher-incubation",
            "pairs",
        ],
    )
    def test_a_run_that_dies_in_a_phase_ends_as_an_uninterrupted_one(
        self, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
    ) -> None:
        recipe = _copy_of(finished, tmp_path)
        with monkeypatch.context() as patch:
            _die_in(patch, phase)
            with pytest.raises(_Killed):
                runner.run(recipe)
        runner.run(recipe)
        expected = {name: value for name, value in tensors(finished / "run").items() if "seeds/" not in name}
        found = tensors(tmp_path / "run")
        for name, value in found.items():
            assert_equal(value, expected[name])
        assert files(tmp_path / "run") == [
            name for name in files(finished / "run") if "seeds" not in name and "equal" not in name
        ]
        assert _log(tmp_path, "arms/kd") == _log(finished, "arms/kd")

    @pytest.mark.parametrize("is_real", [False, True], ids=["a tracker like it", "tensorboard"])
    def test_files_of_a_tracker_go_with_what_was_trained(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_real: bool
    ) -> None:
        if is_real:
            pytest.importorskip("tensorboard")
        else:
            monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", _Tracker)
        content = recipe_content(tmp_path, arms=["e2e", "m2mkd"], equal_compute=False)
        content["training"]["report_to"] = "tensorboard"
        recipe = parse_recipe(content, "tracked")
        with monkeypatch.context() as patch:
            _die_in(patch, "pairs")
            with pytest.raises(_Killed):
                runner.run(recipe)
        runner.run(recipe)
        run = tmp_path / "run"
        kept = {
            phase: len(list((run / phase / "runs").glob("*/*")))
            for phase in ("meta", "teacher", "pairs/0", "pairs/1", "arms/e2e", "arms/m2mkd")
        }
        # the teacher is trained twice; the pairs once more after the death of the first process
        assert kept["meta"] == kept["arms/e2e"] == kept["arms/m2mkd"] == 1
        assert kept["teacher"] == kept["pairs/0"] == kept["pairs/1"] == 2
        assert not list(run.rglob(".*.work")) and not list(run.rglob("checkpoint-*"))

    def test_pairs_can_be_distilled_one_by_one_elsewhere(self, finished: Path, tmp_path: Path) -> None:
        for pair in (1, 0):
            recipe = _copy_of(
                finished, tmp_path, distill={"data": "train", "pairs": [pair], "training": {"eval_strategy": "epoch"}}
            )
            report = runner.run(recipe)
            assert (report is None) == (pair == 1)
        expected = tensors(finished / "run")
        for name, value in tensors(tmp_path / "run").items():
            assert_equal(value, expected[name])

    def test_pairs_distilled_at_once_in_one_folder_do_not_disturb_each_other(
        self, finished: Path, tmp_path: Path
    ) -> None:
        runs = []
        for pair in (0, 1):
            distill = {"data": "train", "pairs": [pair], "training": {"eval_strategy": "epoch"}}
            without = ["pairs", "arms"] if pair == 0 else None
            runs.append(_copy_of(finished, tmp_path, without=without, distill=distill, arms=["e2e", "m2mkd"]))
        outcomes = _at_once(runs)
        # if both end together, both go on with the arms, and one is refused
        assert sum(outcome == "ended" for outcome in outcomes) >= 1
        assert all(outcome == "ended" or "arms/" in outcome for outcome in outcomes)
        runner.run(runs[0])
        expected = tensors(finished / "run")
        found = tensors(tmp_path / "run")
        assert {"pairs/0/model.safetensors", "pairs/1/model.safetensors", "arms/m2mkd/model.safetensors"} <= set(found)
        for name, value in found.items():
            assert_equal(value, expected[name])

    def test_of_two_runs_in_one_folder_the_second_stops_and_says_why(self, finished: Path, tmp_path: Path) -> None:
        # long enough that the second starts before the first ends
        finetune = {"data": "labelled", "training": {"num_train_epochs": 40}}
        recipe = _copy_of(finished, tmp_path, without=["pairs", "arms"], arms=["e2e"], finetune=finetune)
        outcomes = _at_once([recipe, recipe])
        assert outcomes.count("ended") == 1
        assert any("arms/e2e is being made by process" in outcome for outcome in outcomes)
        AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "arms" / "e2e")

    def test_phases_one_by_one_end_as_a_whole_run(
        self, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        recipe = _copy_of(finished, tmp_path, without=["pairs", "arms"], arms=["e2e", "m2mkd"], repeat_seeds=[5])
        with pytest.raises(RunError, match=r"reads pairs/0, pairs/1, which .* --phase pairs/0"):
            runner.run(recipe, "arms/m2mkd")
        with pytest.raises(RecipeError, match=r"--phase is 'pairs/2', but .* meta, teacher, pairs, pairs/0, pairs/1,"):
            runner.run(recipe, "pairs/2")
        for seed in ("", "seeds/5/"):
            for name in ("pairs/1", "pairs/0", "arms/m2mkd", "arms/e2e"):
                report = runner.run(recipe, seed + name)
                assert (report is not None) == (seed + name == "seeds/5/arms/e2e")
                assert (tmp_path / "run" / seed / name).is_dir()
        runner.run(recipe, "pairs/1")
        assert "[seed 0] pairs: finished, skipped" in capsys.readouterr().out
        expected, found = tensors(finished / "run"), tensors(tmp_path / "run")
        for name, value in found.items():
            assert_equal(value, expected[name])
        assert not list((tmp_path / "run").rglob("*.lock"))

    def test_another_recipe_does_not_start_beside_a_run(self, finished: Path, tmp_path: Path) -> None:
        recipe = _copy_of(finished, tmp_path, without=["pairs", "arms"], arms=["e2e", "m2mkd"])
        with one_writer([tmp_path / "run" / "arms" / "e2e"]):
            runner.run(recipe, "pairs/0")
        finetune = {"data": "labelled", "training": {"num_train_epochs": 3}}
        write_json(lock_file(tmp_path / "run/arms/e2e"), {**asdict(Writer.here()), "host": "node7"})
        changed = recipe.model_copy(update={"finetune": recipe.finetune.model_copy(update=finetune)})
        with pytest.raises(RunError, match=r"(?s)on node7, .*is at work on.*finetune.training.num_train_epochs"):
            runner.run(changed, "pairs/1")

    def test_kept_stitches_are_part_of_the_fine_tuned_student(self, finished: Path, tmp_path: Path) -> None:
        finetune = {"data": "labelled", "keep_stitches": True}
        recipe = _copy_of(finished, tmp_path, without=["arms"], finetune=finetune, arms=["m2mkd"])
        runner.run(recipe)
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "arms" / "m2mkd")
        assert model.config.pre_stitch_layers == [1] and model.config.post_stitch_layers == [0]
        assert model.vmoe.layers[1].pre_stitch.linear.weight.shape == (8, 12)

    def test_a_head_and_grid_that_do_not_fit_the_finetuning_data_are_reinitialized_and_named(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        content = recipe_content(tmp_path, arms=["m2mkd"])
        two = write_images(tmp_path / "two", class_names=["green", "red"])
        content["data"]["two"] = {"source": f"imagefolder:{two}", "image_size": 16}
        content["data"]["iid"] = {"source": f"imagefolder:{two}"}
        content["data"]["ood"] = {"source": f"imagefolder:{two}"}
        content["finetune"]["data"] = "two"
        runner.run(parse_recipe(content, "other data"))
        results = json.loads((tmp_path / "run" / "arms" / "m2mkd" / "train_results.json").read_text())
        assert results["reinitialized"] == [
            "vmoe.embeddings.position_embeddings",
            "classifier.weight",
            "classifier.bias",
        ]
        assert "are re-initialized" in capsys.readouterr().out

    def test_a_published_teacher_is_used_from_its_folder(self, finished: Path, tmp_path: Path) -> None:
        teacher = {"pretrained": str(finished / "run" / "teacher"), "depths": [2, 1]}
        recipe = _copy_of(finished, tmp_path, without=["teacher", "pairs", "arms"], teacher=teacher, arms=["kd"])
        runner.run(recipe)
        report = json.loads((tmp_path / "run" / "report.json").read_text())
        assert report["teacher"]["train_flops"] == 0 and report["teacher"]["iid"] is not None
        card = " ".join((tmp_path / "run" / "arms" / "kd" / "README.md").read_text().split())
        assert (
            "The teacher is a ViTForImageClassification with 3 layers of width 12 and 4,275 parameters, loaded from a "
            'local folder named "teacher". It was not trained in this run, and where its weights came from is not '
            "recorded."
        ) in card
        # nothing was distilled, so no data are listed for it
        assert "| end-to-end training | labelled |" in card and "| distillation |" not in card


class TestBadInput:
    def test_a_class_that_is_only_in_the_test_set_is_named(self, tmp_path: Path) -> None:
        content = recipe_content(tmp_path)
        write_images(tmp_path / "test", per_class=2, class_names=["purple"])
        with pytest.raises(DataError, match="data.iid: .*purple"):
            runner.run(parse_recipe(content, "purple"))
        assert not (tmp_path / "run").exists()

    def test_an_empty_class_folder_is_named(self, tmp_path: Path) -> None:
        recipe = tiny_recipe(tmp_path)
        (tmp_path / "train" / "yellow").mkdir()
        with pytest.raises(DataError, match="data.train: .*yellow"):
            runner.run(recipe)

    def test_a_corrupt_image_is_named(self, tmp_path: Path) -> None:
        recipe = tiny_recipe(tmp_path)
        (tmp_path / "train" / "red" / "3.png").write_bytes(b"no image")
        with pytest.raises(DataError, match="red/3.png"):
            runner.run(recipe)

    def test_a_truncated_pair_is_named_and_the_rest_is_kept(self, finished: Path, tmp_path: Path) -> None:
        recipe = _copy_of(finished, tmp_path, without=["arms"], arms=["m2mkd"])
        weights = tmp_path / "run" / "pairs" / "1" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        before = files(tmp_path / "run")
        with pytest.raises(PairFileError, match=r"pairs/1/model.safetensors is damaged"):
            runner.run(recipe)
        assert set(files(tmp_path / "run")) == {*before, "recipe.json"}

    def test_a_missing_pair_file_is_named(self, finished: Path, tmp_path: Path) -> None:
        recipe = _copy_of(finished, tmp_path, without=["arms"], arms=["m2mkd"])
        (tmp_path / "run" / "pairs" / "0" / "stitches.safetensors").unlink()
        (tmp_path / "run" / "pairs" / "0" / "model.safetensors").unlink()
        with pytest.raises(PairFileError, match=r"pairs/0/model.safetensors is missing"):
            runner.run(recipe)

    def test_a_truncated_teacher_is_named(self, finished: Path, tmp_path: Path) -> None:
        recipe = _copy_of(finished, tmp_path, without=["pairs", "arms"])
        weights = tmp_path / "run" / "teacher" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(StageError, match="teacher cannot be loaded"):
            runner.run(recipe)

    def test_another_normalisation_than_the_teachers_is_refused(self, finished: Path, tmp_path: Path) -> None:
        teacher = {"pretrained": str(finished / "run" / "teacher"), "depths": [2, 1]}
        content = recipe_content(tmp_path, teacher=teacher)
        for data in content["data"].values():
            data["mean"] = [0.1, 0.2, 0.3]
        with pytest.raises(StageError, match="differ in `image_mean`"):
            runner.run(parse_recipe(content, "other pixels"))

    def test_a_full_disk_is_one_message_and_keeps_finished_phases(
        self, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recipe = _copy_of(finished, tmp_path, without=["arms"])

        def no_space(*args: Any, **kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

        before = files(tmp_path / "run")
        monkeypatch.setattr("m2mkd.modeling.modeling_vmoe.VMoEForImageClassification.save_pretrained", no_space)
        with pytest.raises(RunError, match=r"Cannot write .*arms/kd: .*No space left on device.*GB are free"):
            runner.run(recipe)
        monkeypatch.undo()
        assert set(before) <= set(files(tmp_path / "run"))
        runner.run(recipe)

    def test_an_unknown_field_of_a_network_is_named(self, tmp_path: Path) -> None:
        content = recipe_content(tmp_path)
        content["student"]["model"]["config"]["num_expert"] = 2
        with pytest.raises(RecipeError, match=r"vmoe configuration has no field \['num_expert'\]"):
            runner.run(parse_recipe(content, "typo"))

    def test_a_value_that_the_training_arguments_refuse_is_named_before_anything_is_trained(
        self, tmp_path: Path
    ) -> None:
        recipe = tiny_recipe(tmp_path, distill={"data": "train", "training": {"alpha": 1.5}})
        with pytest.raises(RecipeError, match=r"distill.training .*`alpha`.* 1.5"):
            runner.run(recipe)

    def test_a_tracker_that_is_not_installed_is_named_before_anything_is_trained(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        missing = Mock(side_effect=RuntimeError("requires tensorboard to be installed"))
        monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", missing)
        recipe = tiny_recipe(tmp_path, training={"report_to": "tensorboard"})
        with pytest.raises(RecipeError, match="meta.training .*requires tensorboard to be installed"):
            runner.run(recipe)


class _Tracker(TrainerCallback):
    """Writes where TensorBoard's callback does."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / "runs" / str(time.time_ns())
        folder.mkdir(parents=True)
        (folder / "events").write_text("begun")


class _Killed(BaseException):
    pass


def _at_once(recipes: list[Any]) -> list[str]:
    """Run recipes in processes of their own that start together; "ended" or the message of each."""
    fork = multiprocessing.get_context("fork")
    start, outcomes = fork.Barrier(len(recipes)), fork.SimpleQueue()
    processes = [fork.Process(target=_outcome, args=(recipe, start, outcomes)) for recipe in recipes]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [outcomes.get() for _ in recipes]


def _outcome(recipe: Any, start: Any, outcomes: Any) -> None:
    start.wait()
    try:
        runner.run(recipe)
        outcomes.put("ended")
    except RunError as error:
        outcomes.put(str(error))


class _DieAtStep(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # after the first epoch's checkpoint, in the middle of the second epoch
        if state.epoch is not None and 1 < state.epoch < 2:
            raise _Killed


def _die_in(patch: pytest.MonkeyPatch, phase: str) -> None:
    ordinary = M2MKDTrainer.train

    def train(self: M2MKDTrainer, *args: Any, **kwargs: Any) -> Any:
        name = Path(self.args.output_dir).name
        where = "pairs" if "work-" in name else name.strip(".").removesuffix(".work")
        if where == phase:
            self.add_callback(_DieAtStep())
        return ordinary(self, *args, **kwargs)

    patch.setattr(M2MKDTrainer, "train", train)


def _copy_of(finished: Path, folder: Path, without: list[str] | None = None, **changes: Any) -> Any:
    """
    The tiny recipe with the data of `finished` and a run folder of its own: empty, or what `finished` has but for the
    phases `without`.
    """
    content = recipe_content(finished, **changes)
    content["output_dir"] = str(folder / "run")
    if without is not None:
        skipped = shutil.ignore_patterns("recipe.json", "seeds", "report.*", *without)
        shutil.copytree(finished / "run", folder / "run", ignore=skipped, dirs_exist_ok=True)
    return parse_recipe(content, "a copy")


def _log(folder: Path, phase: str) -> list[dict[str, Any]]:
    return json.loads((folder / "run" / phase / "train_results.json").read_text())["log_history"]


def _forbidden(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("nothing is left to train")
