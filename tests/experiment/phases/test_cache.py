"""Runs whose pairs and arms read the teacher's stored targets."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from testing_utils import assert_equal
from tiny_run import recipe_content
from torch import nn

from m2mkd.distillation import target_cache
from m2mkd.errors import CacheError, RecipeError, WriteError
from m2mkd.experiment import runner
from m2mkd.experiment.plan.plan import Plan, make_plan
from m2mkd.experiment.recipe import Recipe
from m2mkd.experiment.recipe_file import parse_recipe
from m2mkd.trainer.m2mkd_trainer import M2MKDTrainer


ARMS = [
    {"m2mkd_kd": {"data": "train"}},
    {"kd": {"data": "train", "budget": {"flops_of": "m2mkd_kd"}}},
    "e2e",
]


def recipe(folder: Path, cache: Any = "float32", **changes: Any) -> Recipe:
    """The teacher as context, both ways of distillation on the same two views of the images."""
    content = recipe_content(folder)
    content["training"]["per_device_eval_batch_size"] = 6  # as in training, so that products round alike
    content["data"]["train"]["views"] = 2
    del content["meta"]
    content |= {
        "arms": ARMS,
        "distill": {
            "data": "train",
            "context": "teacher",
            "match": "boundary",
            "cache": cache,
            "training": {"num_train_epochs": 3, "alpha": 1.0},
        },
        "kd": {"cache": cache, "training": {"alpha": 1.0}},
    }
    return parse_recipe({**content, **changes}, "tiny")


def weights(run: Path) -> dict[str, dict[str, Any]]:
    paths = [*run.rglob("pairs/*/*.safetensors"), *run.rglob("arms/*/*.safetensors")]
    return {str(path.relative_to(run)): load_file(path) for path in sorted(paths)}


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "report.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    runner.run(recipe(folder, repeat_seeds=[5]))
    return folder


class TestRun:
    def test_the_weights_are_those_of_a_run_with_the_teacher(self, finished: Path, tmp_path: Path) -> None:
        arms = ARMS[:1]
        runner.run(recipe(tmp_path, cache=False, arms=arms))
        found, expected = weights(finished / "run"), weights(tmp_path / "run")
        assert {"pairs/0/model.safetensors", "arms/m2mkd_kd/model.safetensors"} <= expected.keys()
        for name in expected:
            assert_equal(found[name], expected[name])

    def test_one_cache_for_all_arms_and_seeds(self, finished: Path) -> None:
        run = finished / "run"
        assert [path.parent.relative_to(run) for path in run.rglob("cache.json")] == [Path("cache/train")]
        contracts = [json.loads(path.read_text()) for path in run.rglob("pair.json")]
        assert len(contracts) == 4 and len({contract["teacher_sha256"] for contract in contracts}) == 1

    def test_an_arm_that_reads_it_counts_it(self, finished: Path) -> None:
        result = report(finished)["arms"]["m2mkd_kd"]
        assert list(result["phases"]) == ["cache", "distill", "finetune"]
        cache = result["phases"]["cache"]
        assert cache["train_flops"] > 0 and cache["epochs"] == 2 and cache["labels"] == 0
        for name in ("train_flops", "train_seconds"):
            assert result[name] == pytest.approx(sum(own[name] for own in result["phases"].values()))
        assert "phases" not in report(finished)["arms"]["e2e"]

    def test_a_budget_covers_it_on_both_sides(self, finished: Path) -> None:
        arms = report(finished)["arms"]
        epoch = arms["kd"]["phases"]["finetune"]["train_flops"] / arms["kd"]["epochs"]
        budget = arms["m2mkd_kd"]["train_flops"]
        assert budget <= arms["kd"]["train_flops"] * (1 + 1e-9) and arms["kd"]["train_flops"] < budget + epoch

    def test_the_plan_counts_what_the_run_does(self, finished: Path) -> None:
        plan: Plan = make_plan(recipe(finished))
        arms = report(finished)["arms"]
        assert [phase.name for phase in plan.phases if phase.name.startswith("cache")] == ["cache/train"]
        assert plan.totals["m2mkd_kd"] == pytest.approx(arms["m2mkd_kd"]["train_flops"], rel=1e-6)
        flops = {phase.name: phase.flops for phase in plan.phases}
        assert flops["cache/train"] == pytest.approx(arms["kd"]["phases"]["cache"]["train_flops"], rel=1e-6)
        assert flops["arm kd"] == pytest.approx(arms["kd"]["phases"]["finetune"]["train_flops"], rel=1e-6)

    def test_the_teacher_runs_only_while_it_is_stored(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        own = recipe(tmp_path, arms=["m2mkd"], distill={**recipe(tmp_path).distill.model_dump(), "pairs": "all"})
        runner.run(own)
        for name in ("pairs", "arms"):
            shutil.rmtree(tmp_path / "run" / name)

        def forbidden(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("the teacher runs")

        embed = nn.Conv2d.forward

        def watched(self: nn.Conv2d, *args: Any) -> Any:
            return embed(self, *args) if self.out_channels != 12 else forbidden()

        monkeypatch.setattr(nn.Conv2d, "forward", watched)
        runner.run(own)
        assert (tmp_path / "run" / "arms" / "m2mkd" / "model.safetensors").is_file()


class TestInterruption:
    def test_a_killed_run_goes_on(self, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        own = recipe(tmp_path, arms=ARMS[:1])
        with monkeypatch.context() as patched:
            patched.setattr(target_cache, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                runner.run(own)
        assert not (tmp_path / "run" / "cache" / "train").exists()
        with monkeypatch.context() as patched:
            patched.setattr(M2MKDTrainer, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                runner.run(own)
        stored = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "cache").rglob("*.safetensors")}
        runner.run(own)
        assert {path: path.stat().st_mtime_ns for path in stored} == stored
        found, expected = weights(tmp_path / "run"), weights(finished / "run")
        assert_equal(found["arms/m2mkd_kd/model.safetensors"], expected["arms/m2mkd_kd/model.safetensors"])

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
        with pytest.raises((WriteError, RuntimeError), match="needs .* GiB, but only .* are free.*Free up disk space"):
            runner.run(recipe(tmp_path, arms=ARMS[:1]))

    def test_a_cache_of_another_teacher(self, finished: Path, tmp_path: Path) -> None:
        own = recipe(tmp_path, arms=ARMS[:1], seed=7)
        runner.run(own)
        shutil.rmtree(tmp_path / "run" / "pairs")
        shutil.rmtree(tmp_path / "run" / "teacher")
        shutil.copytree(finished / "run" / "teacher", tmp_path / "run" / "teacher")
        with pytest.raises(CacheError, match="run/cache/train was made with another teacher_sha256"):
            runner.run(own)

    def test_a_truncated_cache(self, tmp_path: Path) -> None:
        own = recipe(tmp_path, arms=ARMS[:1])
        runner.run(own)
        shutil.rmtree(tmp_path / "run" / "arms")
        path = next((tmp_path / "run" / "cache" / "train" / "logits").iterdir())
        path.write_bytes(path.read_bytes()[:-2])
        with pytest.raises(CacheError, match="should have .* bytes. Delete .*run/cache/train"):
            runner.run(own)


class TestRefused:
    @pytest.mark.parametrize(
        "section, change, words",
        [
            ("distill", {"context": "meta"}, "set `distill.context` to teacher"),
            ("distill", {"match": "logits"}, "`distill.match: boundary`"),
            ("distill", {"training": {"eval_strategy": "epoch"}}, 'Set `distill.training.eval_strategy` to "no"'),
            ("distill", {"cache": "float16"}, "`kd.cache` is float32; they share"),
            ("distill", {"cache": "float8"}, "distill.cache"),
            ("data", {"views": None}, "`distill.cache`: data.train: .* set views"),
            ("data", {"mixup": 0.8}, "data.train: mixup=0.8 .* set mixup to 0.0"),
            ("data", {"repeated": 2}, "set repeated to 1"),
        ],
    )
    def test_keys_and_the_way_out(self, tmp_path: Path, section: str, change: dict[str, Any], words: str) -> None:
        content = recipe(tmp_path).model_dump(mode="json")
        changed = content["data"]["train"] if section == "data" else content[section]
        changed |= change
        with pytest.raises(RecipeError, match=words):
            parse_recipe(content, "tiny")

    def test_true_and_false_are_short_for_a_type_and_none(self, tmp_path: Path) -> None:
        assert recipe(tmp_path, cache=True).distill.cache == "float16"
        assert recipe(tmp_path, cache=False).kd.cache is None

    def test_the_sets_of_arms_are_checked_too(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match=r"`kd.cache \(arm kd\)`: data.train: .* set views"):
            own = recipe(tmp_path).model_dump(mode="json")
            own["distill"]["cache"], own["data"]["train"]["views"] = None, None
            parse_recipe({**own, "arms": [{"kd": {"data": "train"}}]}, "tiny")
