import io
import json
import math
from pathlib import Path
from statistics import stdev

import pytest
import yaml
from PIL import Image
from rich.console import Console

from m2mkd.errors import RunError, WriteError
from m2mkd.experiment.report import write_report
from m2mkd.experiment.report.collect import COSTS, collect, read_histories
from m2mkd.experiment.report.markdown import to_markdown
from m2mkd.experiment.report.terminal import print_report
from m2mkd.model_cards.tables import comparison_sentence


RECIPE = {"name": "tiny", "student": {"depths": [1, 1]}, "training": {"learning_rate": 1e-5, "hub_token": "hf_secret"}}
ARMS = ("e2e", "e2e_equal_compute", "kd", "kd_equal_compute", "m2mkd")
# IID and OOD accuracy by seed
SCORES = {
    "e2e": [(0.50, 0.20), (0.52, 0.24), (0.51, 0.20)],
    "e2e_equal_compute": [(0.55, 0.22), (0.56, 0.22), (0.57, 0.22)],
    "kd": [(0.70, 0.30), (0.71, 0.31), (0.72, 0.32)],
    "kd_equal_compute": [(0.58, 0.20), (0.58, 0.20), (0.58, 0.20)],
    "m2mkd": [(0.58, 0.21), (0.59, 0.22), (0.57, 0.23)],
}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def costs(**changes):
    history = [{"epoch": 1.0, "step": 5, "loss": 2.0}, {"epoch": 1.0, "step": 5, "eval_accuracy": 0.3}]
    values = dict(zip(COSTS, (10.0, 1000, 4e12, 300, 100, 40, 10.0), strict=True))
    return {**values, "log_history": history, **changes}


def write_phase(folder, iid=0.9, ood=0.6, load=None, **changes):
    scores = [
        None if accuracy is None else {"accuracy": accuracy, "top5_accuracy": 0.99, "loss": 1.5, "n": 50}
        for accuracy in (iid, ood)
    ]
    write(folder / "eval_results.json", {"iid": scores[0], "ood": scores[1], "expert_load": load})
    write(folder / "train_results.json", costs(**changes))


def write_run(folder, arms=ARMS, seeds=(0, 1, 2), ood=True):
    """A finished run: seed 0 in the folder itself, the others in seeds/."""
    phases = {"incubation": costs(), "finetuning": costs(epochs=3.0)}
    if "m2mkd" in arms:
        write_phase(folder / "meta")
    if "m2mkd" in arms or "kd" in arms:
        write_phase(folder / "teacher", train_flops=1e14, phases=phases)
    for seed in seeds:
        own = folder if seed == 0 else folder / "seeds" / str(seed)
        for arm in arms:
            scores = SCORES[arm][seed]
            load = {"1": [0.75, 0.25], "11": [0.5, 0.5], "3": [0.4, 0.6]} if arm == "m2mkd" else None
            changes = {"epochs": 15.0, "train_flops": 7e12} if "equal" in arm else {}
            write_phase(own / "arms" / arm, scores[0], scores[1] if ood else None, load, **changes)
        for index in range(2 if "m2mkd" in arms else 0):
            history = [{"epoch": 1.0, f"eval_pair_{index}_accuracy": 0.4}]
            changes = {"train_samples_seen": 500 + index, "images": 200, "labels": 20, "log_history": history}
            write(own / "pairs" / str(index) / "train_results.json", costs(train_flops=1.5e12, **changes))


@pytest.fixture
def run_folder(tmp_path):
    write_run(tmp_path)
    return tmp_path


def collect_all(folder, recipe=RECIPE, seeds=(1, 2)):
    return collect(folder, recipe, 0, list(seeds), "CPU")


class TestCollect:
    def test_schema(self, run_folder):
        report = collect_all(run_folder)
        assert {"recipe", "seed", "device", "versions", "meta", "teacher", "arms"} <= set(report)
        assert (report["seed"], report["device"], tuple(report["arms"])) == (0, "CPU", ARMS)
        assert set(report["versions"]) == {"python", "torch", "transformers", "accelerate", "m2mkd"}
        for result in (report["meta"], report["teacher"], *report["arms"].values()):
            assert set(result["iid"]) == set(result["ood"]) == {"accuracy", "top5_accuracy", "loss", "n"}
            assert {"train_seconds", "train_samples_seen", "parameters", "train_flops"} <= set(result)
        assert report["teacher"]["phases"]["finetuning"]["epochs"] == 3
        assert list(report["seeds"]) == ["0", "1", "2"]
        assert report["seeds"]["0"]["arms"] == report["arms"]
        assert json.loads(json.dumps(report, allow_nan=False)) == report

    def test_m2mkd_adds_its_distillation(self, run_folder):
        result = collect_all(run_folder)["arms"]["m2mkd"]
        # two pairs beside the end-to-end phase; samples are those of the longer pair, not of both
        assert result["train_seconds"] == 10 + 2 * 10
        assert result["train_flops"] == 4e12 + 2 * 1.5e12
        assert result["train_samples_seen"] == 1000 + 501
        assert (result["images"], result["labels"]) == (200, 40)
        assert (result["epochs"], result["parameters"]) == (10, 300)
        assert result["phases"]["distill"]["train_flops"] == 3e12
        assert result["phases"]["finetune"]["train_flops"] == 4e12

    def test_only_arms_that_ran(self, tmp_path):
        write_run(tmp_path, arms=("e2e",), seeds=(0,), ood=False)
        report = collect_all(tmp_path, seeds=())
        assert (list(report["arms"]), report["meta"], report["teacher"]) == (["e2e"], None, None)
        assert report["comparisons"] == []
        assert report["arms"]["e2e"]["ood"] is None
        assert report["summary"]["e2e"] == {"iid": {"mean": 0.5, "std": None, "values": [0.5]}, "ood": None}

    def test_an_arm_that_only_some_seeds_have(self, run_folder):
        for name in ("eval_results.json", "train_results.json"):
            (run_folder / "seeds" / "2" / "arms" / "kd" / name).unlink()
        (run_folder / "seeds" / "2" / "arms" / "kd").rmdir()
        report = collect_all(run_folder)
        assert report["summary"]["kd"]["iid"]["values"] == [0.70, 0.71]
        comparison = next(entry for entry in report["comparisons"] if entry["baseline"] == "kd")
        assert (comparison["iid"]["n"], comparison["iid"]["wins"]) == (2, 0)
        assert "70.5 ± 0.7 (2 of 3 seeds)" in to_markdown(report)
        # unless the recipe asks for it
        with pytest.raises(RunError, match=r"seeds/2/arms/kd/eval_results.json is missing"):
            collect_all(run_folder, {**RECIPE, "arms": ["e2e", "kd", "m2mkd"]})

    def test_equal_compute_arms_that_the_recipe_asks_for(self, tmp_path):
        write_run(tmp_path, arms=("e2e", "m2mkd"))
        assert collect_all(tmp_path, {**RECIPE, "arms": ["e2e", "m2mkd"]})
        with pytest.raises(RunError, match="e2e_equal_compute"):
            collect_all(tmp_path, {**RECIPE, "arms": ["e2e", "m2mkd"], "equal_compute": True})

    def test_networks_of_other_classes_are_not_tested(self, run_folder):
        write_phase(run_folder / "teacher", iid=None, ood=None)
        report = collect_all(run_folder)
        assert report["teacher"]["iid"] is None
        assert "| teacher | – | – |" in to_markdown(report)

    def test_no_token_and_no_nan(self, run_folder):
        results = json.loads((run_folder / "arms" / "e2e" / "eval_results.json").read_text())
        results["iid"]["loss"] = math.nan
        write(run_folder / "arms" / "e2e" / "eval_results.json", results)
        report = collect_all(run_folder, {**RECIPE, "limit": math.inf, "folder": Path("data")})
        assert report["arms"]["e2e"]["iid"]["loss"] is None
        assert (report["recipe"]["limit"], report["recipe"]["folder"]) == (None, "data")
        assert "hf_secret" not in json.dumps(report, allow_nan=False)


class TestStatistics:
    def test_summary(self, run_folder):
        summary = collect_all(run_folder)["summary"]["e2e"]["iid"]
        # deviations -0.01, 0.01, 0 around 0.51: variance 0.0002 / 2
        assert summary == {"mean": pytest.approx(0.51), "std": pytest.approx(0.01), "values": [0.50, 0.52, 0.51]}

    def test_comparisons_are_paired(self, run_folder):
        comparisons = {entry["baseline"]: entry for entry in collect_all(run_folder)["comparisons"]}
        assert comparisons["kd"]["budget"] == comparisons["e2e"]["budget"] == "equal end-to-end epochs"
        assert comparisons["kd_equal_compute"]["budget"] == "equal training compute"
        # seed by seed: 0.08, 0.07, 0.06
        iid = comparisons["e2e"]["iid"]
        assert iid["mean_difference"] == pytest.approx(0.07)
        assert iid["std"] == pytest.approx(0.01)
        assert (iid["wins"], iid["n"]) == (3, 3)
        # 0.01, -0.02, 0.03
        ood = comparisons["e2e"]["ood"]
        assert ood["mean_difference"] == pytest.approx(0.02 / 3)
        assert ood["std"] == pytest.approx(stdev([0.01, -0.02, 0.03]))
        assert ood["wins"] == 2
        # a tie is no win: 0, 0.01, -0.01
        assert comparisons["kd_equal_compute"]["iid"]["wins"] == 1
        assert comparisons["e2e"]["budget_ratio"] == comparisons["e2e_equal_compute"]["budget_ratio"] == 1

    def test_one_seed_and_no_ood(self, tmp_path):
        write_run(tmp_path, ood=False)
        assert collect_all(tmp_path, seeds=())["comparisons"][0]["iid"]["std"] is None
        report = collect_all(tmp_path)
        assert all(entry["ood"] is None for entry in report["comparisons"])
        assert all("OOD" not in comparison_sentence(entry) for entry in report["comparisons"])


class TestErrors:
    @pytest.mark.parametrize(
        "file", ["arms/kd/train_results.json", "teacher/train_results.json", "seeds/1/pairs/0/train_results.json"]
    )
    @pytest.mark.parametrize("content", [None, "", '{"train_seconds": 1', "[1]", "{}", "\0"])
    def test_missing_and_damaged_files(self, run_folder, file, content):
        path = run_folder / file
        path.unlink()
        if content is not None:
            path.write_text(content)
        with pytest.raises(RunError) as caught:
            collect_all(run_folder)
        assert str(path) in str(caught.value)
        # the runner passes over a phase whose results are there, so its folder has to go
        assert f"Delete {path.parent} and run the recipe again" in str(caught.value)

    @pytest.mark.parametrize("value", [None, "1", True, -1, math.nan, math.inf])
    def test_costs_are_numbers(self, run_folder, value):
        write(run_folder / "meta" / "train_results.json", costs(train_flops=value))
        with pytest.raises(RunError, match=r"meta/train_results.json is damaged: `train_flops` should be a number"):
            collect_all(run_folder)

    @pytest.mark.parametrize("accuracy", [61.2, math.nan, None, -0.1])
    def test_accuracy_is_a_share(self, run_folder, accuracy):
        scores = {"accuracy": accuracy, "n": 10}
        write(run_folder / "arms" / "e2e" / "eval_results.json", {"iid": scores, "ood": None})
        with pytest.raises(RunError, match="`accuracy` should be a number of at least 0 and at most 1"):
            collect_all(run_folder)

    def test_an_untested_arm(self, run_folder):
        write_phase(run_folder / "arms" / "e2e", iid=None)
        with pytest.raises(RunError, match="an arm needs an `iid` result"):
            collect_all(run_folder)

    @pytest.mark.parametrize("load", [[0.5], {"1": []}, {"1": ["a"]}, {"1": 0.5}])
    def test_expert_load(self, run_folder, load):
        write_phase(run_folder / "arms" / "e2e", load=load)
        with pytest.raises(RunError, match="expert_load"):
            collect_all(run_folder)

    @pytest.mark.parametrize("dropped", [None, 0.25])
    def test_dropped_choices(self, run_folder, dropped):
        path = run_folder / "arms" / "e2e" / "eval_results.json"
        write(path, {**json.loads(path.read_text()), "dropped": dropped})
        assert collect_all(run_folder)["arms"]["e2e"]["dropped"] == dropped
        write(path, {**json.loads(path.read_text()), "dropped": 1.5})
        with pytest.raises(RunError, match="`dropped` should be a number of at least 0 and at most 1"):
            collect_all(run_folder)

    @pytest.mark.parametrize("index", [0, 1])
    def test_a_missing_pair_is_not_passed_over(self, run_folder, index):
        (run_folder / "pairs" / str(index) / "train_results.json").unlink()
        (run_folder / "pairs" / str(index)).rmdir()
        with pytest.raises(RunError, match=rf"pairs/{index}/train_results.json is missing. Run the recipe again"):
            collect_all(run_folder)

    def test_nothing_has_run_and_damaged_history(self, tmp_path):
        with pytest.raises(RunError, match="No arm has run"):
            collect_all(tmp_path)
        write_phase(tmp_path / "arms" / "e2e", log_history=[1])
        with pytest.raises(RunError, match="log_history"):
            read_histories(tmp_path, 0, [])


class TestWriteReport:
    def test_files(self, run_folder):
        report = collect_all(run_folder)
        path = write_report(run_folder, report, read_histories(run_folder, 0, [1, 2]))
        assert path == run_folder / "report.md"
        assert json.loads((run_folder / "report.json").read_text()) == report
        with Image.open(run_folder / "report.png") as picture:
            assert picture.size == (1540, 990)
        text = path.read_text()
        assert all(comparison_sentence(entry) in text for entry in report["comparisons"])
        assert "| e2e | 51.0 ± 1.0 | 21.3 ± 2.3 | 10 | 100 | 40 | 10 s | 0.3 K | 4 |" in text
        # 7 TFLOPs of its own, the meta model's 4 and the teacher's 100
        assert "| m2mkd | 200 | 40 | 1,501 | 30 s | 7 | meta, teacher | 111 |" in text
        assert "![" in text and "(report.png)" in text and "Training the meta model and the teacher is extra" in text
        recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
        assert recipe == report["recipe"] and recipe["training"] == {"learning_rate": 1e-5}

    def test_minimal_run(self, tmp_path):
        write_run(tmp_path, arms=("e2e",), seeds=(0,), ood=False)
        path = write_report(tmp_path / "new" / "folder", collect_all(tmp_path, seeds=()), {})
        with Image.open(path.with_name("report.png")) as picture:
            assert picture.size == (990, 528)

    def test_nan_becomes_null(self, run_folder):
        report = collect_all(run_folder)
        report["arms"]["e2e"]["iid"]["loss"] = math.nan
        write_report(run_folder, report, {})
        content = json.loads((run_folder / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
        assert content["arms"]["e2e"]["iid"]["loss"] is None

    def test_a_failed_write_leaves_the_old_report(self, run_folder, monkeypatch):
        report = collect_all(run_folder)
        write_report(run_folder, report, {})
        before = {path.name: path.read_bytes() for path in run_folder.glob("report.*")}

        def full_disk(path, content):
            with open(path, "wb") as file:
                file.write(content[:10])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full_disk)
        with pytest.raises(WriteError, match="No space left.*Free up disk space"):
            write_report(run_folder, {**report, "device": "another"}, {})
        monkeypatch.undo()
        assert {path.name: path.read_bytes() for path in run_folder.glob("report.*")} == before
        assert not list(run_folder.glob(".report*"))

    def test_others_may_read_it(self, run_folder):
        (run_folder / "any").touch()
        path = write_report(run_folder, collect_all(run_folder), {})
        assert path.stat().st_mode == (run_folder / "any").stat().st_mode

    @pytest.mark.parametrize(
        "folder, said", [(None, "google/vit from the Hub, a ViT"), ("mine", 'folder named "mine"')]
    )
    def test_a_pretrained_teacher_is_not_counted(self, run_folder, folder, said):
        network = {"class": "ViT", "num_hidden_layers": 2, "hidden_size": 8, "folder": folder}
        write_phase(run_folder / "teacher", train_flops=0, pretrained="google/vit", network=network)
        report = collect_all(run_folder)
        assert report["teacher"]["pretrained"] == "google/vit" and report["teacher"]["network"] == network
        text = to_markdown(report)
        assert "| 7 | meta, teacher (pretrained, not counted) | 11 |" in text
        assert said in text and "2 layers of width 8" in text
        # its training is not among what the arms need, and an arm that needs nothing else needs no other training
        assert "Training the meta model is extra." in text and "the teacher is extra" not in text
        assert "- kd: " in text and "The teacher was pretrained." in text


class TestPrintReport:
    def test_table_and_sentences(self, run_folder):
        report = collect_all(run_folder, {**RECIPE, "name": "a [bold] name"})
        output = io.StringIO()
        print_report(report, Console(file=output, width=160))
        lines = output.getvalue().splitlines()
        assert "a [bold] name on CPU" in lines[0]
        rows = [line for line in lines if line.startswith("│")]
        assert [row.split("│")[1].strip() for row in rows] == ["teacher", "meta", *ARMS]
        assert "51.0 ± 1.0" in rows[2]
        assert lines[-4:] == [comparison_sentence(entry) for entry in report["comparisons"]]

    def test_a_log_file_is_wide_enough(self, run_folder, capsys):
        print_report(collect_all(run_folder))
        assert any(
            line.startswith("│ e2e_equal_compute │ 56.0 ± 1.0 │") for line in capsys.readouterr().out.splitlines()
        )
