"""The command line, run as a user runs it, where it matters in a process of its own."""

import json
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from safetensors.torch import load_file
from testing_utils import assert_equal
from tiny_run import recipe_content
from typer.testing import CliRunner

import m2mkd
from m2mkd.cli import app
from m2mkd.experiment import runner


ROOT = Path(__file__).parents[1]


def recipe_file(folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_content(folder)))
    return path


def train(*arguments: str, launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.CompletedProcess[str]:
    command = [*launcher, str(ROOT / "train.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


class TestConsoleScript:
    def test_help_and_version_import_neither_torch_nor_transformers(self) -> None:
        script = (
            "import sys, m2mkd_cli, m2mkd\n"
            "from typer.testing import CliRunner\n"
            "from m2mkd.cli import app\n"
            "commands = [command.name for command in app.registered_commands]\n"
            "for words in [['--help'], ['--version'], *([name, '--help'] for name in commands)]:\n"
            "    done = CliRunner().invoke(app, words)\n"
            "    assert done.exit_code == 0 and done.output, words\n"
            "heavy = {'torch', 'transformers', 'numpy', 'accelerate', 'datasets'} & set(sys.modules)\n"
            "assert commands and not heavy, heavy\n"
            # a name is there all the same, and with it the model types
            "from m2mkd import NACConfig\n"
            "from transformers import AutoConfig\n"
            "assert isinstance(AutoConfig.for_model('nac'), NACConfig) and AutoConfig.for_model('vmoe')\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr

    def test_it_has_a_version(self) -> None:
        done = CliRunner().invoke(app, ["--version"])
        assert done.exit_code == 0 and done.output == f"m2mkd {m2mkd.__version__}\n"


class TestTrain:
    def test_a_recipe_runs_with_overrides_and_says_where_the_report_is(self, tmp_path: Path) -> None:
        path = recipe_file(tmp_path)
        done = train(
            str(path), "--arms", "[e2e]", "--training.num_train_epochs=1", "--output_dir", f"{tmp_path}/other"
        )
        assert done.returncode == 0, done.stderr
        assert f"The report is in {tmp_path}/other/report.md" in done.stdout
        # the plan first, the next steps last
        assert done.stderr.startswith("m2mkd ") and "To run: about " in done.stdout.partition("e2e: IID")[0]
        assert f"m2mkd push {tmp_path}/other --arm e2e" in done.stdout.splitlines()[-1]
        report = json.loads((tmp_path / "other" / "report.json").read_text())
        assert list(report["arms"]) == ["e2e"] and report["arms"]["e2e"]["epochs"] == 1
        # transformers has a warning for each of its image processors where torchvision is not installed
        assert "torchvision" not in done.stdout + done.stderr

    def test_a_plan_is_printed_and_nothing_is_run(self, tmp_path: Path) -> None:
        recipe = str(ROOT / "recipes" / "vmoe_base_imagenet.yaml")
        options = ("--plan", "--gpus", "8", "--throughput", "150", "--arms", "[e2e]", "--output_dir", str(tmp_path))
        done = CliRunner().invoke(app, ["run", recipe, *options])
        assert done.exit_code == 0, done.stderr
        assert "on 8 GPUs" in done.stdout and "at 150 TFLOP/s per GPU (stated)" in done.stdout
        # V-MoE-Base, ImageNet-1k, 1,024 images a step
        assert all(number in done.stdout for number in ("483.3 M", "1,281,167", "1,024", "125,200"))
        # the sets come first
        assert "1,281,167 images of 1,000 classes (n01440764, " in done.stdout.partition("Plan of")[0]
        assert not list(tmp_path.iterdir())

    def test_a_miniature_is_another_recipe_in_another_folder(self, tmp_path: Path) -> None:
        recipe = str(ROOT / "recipes" / "image_folder.yaml")
        options = ("--miniature", "--plan", "--arms", "[e2e]", "--output_dir", f"{tmp_path}/mine")
        done = CliRunner().invoke(app, ["run", recipe, *options])
        assert done.exit_code == 0, done.stderr
        assert "image folder (miniature)" in done.stdout
        assert [path.name for path in tmp_path.iterdir()] == ["mine-miniature"]

    def test_what_a_user_can_mend_ends_in_one_message_without_a_traceback(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", "--sede", "1", "--output_dir", str(tmp_path / "run")])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        said = capsys.readouterr().err
        assert end.value.code == 1
        assert said.strip().splitlines()[-1].startswith(("Error:", " ")), said
        assert "sede: there is no such key" in said and "Traceback" not in said

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["--plan", "--throughput", "fast"], "--throughput is 'fast'; give a positive number of TFLOP/s"),
            (["--seed"], "--seed has no value"),
            (["nowhere.yaml"], "There is no recipe nowhere.yaml"),
            (["--plan", "--finetune.training.eval_strategy", "never"], "`eval_strategy` is 'never'; use one of no, "),
            (["--plan", "--training.warmup_steps", "-1"], "arguments of teacher.finetuning (with those of training)"),
            (["--plan", "--teacher.pretrained", "a/b/c"], "There is no folder a/b/c, and it is not a valid Hub id"),
            (["--teacher.pretrained", "a/b/c"], "There is no folder a/b/c, and it is not a valid Hub id"),
            (["--data.iid.source", "imagefolder:/nowhere"], "/nowhere"),
        ],
    )
    def test_the_message_says_what_is_wrong(self, tmp_path: Path, arguments: list[str], message: str) -> None:
        folder = [] if arguments[0].endswith("yaml") else ["--output_dir", str(tmp_path / "run")]
        done = CliRunner().invoke(app, ["run", *arguments, *folder])
        assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
        assert message in done.stderr

    def test_the_recipes_are_listed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(ROOT)
        lines = CliRunner().invoke(app, ["run", "--list"]).stdout.splitlines()
        assert lines[0].startswith("(none given): V-MoE-tiny for digits: ")
        assert [line.partition(":")[0] for line in lines[1:]] == sorted(map(str, Path("recipes").glob("*.yaml")))
        missing = CliRunner().invoke(app, ["run", "recipes/nac.yaml"])
        assert "There is no recipe recipes/nac.yaml. Available: recipes/digits_from_teacher.yaml, " in missing.stderr

    def test_ctrl_c_ends_in_one_sentence(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runner, "run", Mock(side_effect=KeyboardInterrupt))
        done = CliRunner().invoke(app, ["run", str(recipe_file(tmp_path))])
        assert done.exit_code == 130
        assert done.stderr == "Interrupted. Finished phases are kept; run the same command again to go on.\n"

    def test_two_processes_run_a_recipe_together(self, tmp_path: Path) -> None:
        path = recipe_file(tmp_path)
        launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517")
        done = train(str(path), launcher=launcher)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("The report is in") == 1
        assert {path.name for path in (tmp_path / "run" / "arms").iterdir()} == {"e2e", "kd", "m2mkd"}

    @pytest.mark.slow
    @pytest.mark.parametrize("processes, delays", [("1", (8.0, 9.0, 10.0)), ("2", (12.0, 14.0, 16.0))])
    def test_a_run_killed_at_any_moment_ends_with_the_same_files(
        self, tmp_path: Path, processes: str, delays: Sequence[float]
    ) -> None:
        path = recipe_file(tmp_path)
        assert train(str(path)).returncode == 0
        whole = tmp_path / "whole"
        (tmp_path / "run").rename(whole)
        command = [sys.executable, str(ROOT / "train.py"), str(path), "--processes", processes]
        for delay in delays:
            process = subprocess.Popen(command)
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert train(str(path)).returncode == 0
        names = sorted(str(file.relative_to(whole)) for file in whole.rglob("*") if file.is_file())
        run = tmp_path / "run"
        assert names == sorted(str(file.relative_to(run)) for file in run.rglob("*") if file.is_file())
        for name in names:
            if name.endswith(".safetensors"):
                assert_equal(load_file(run / name), load_file(whole / name))


class TestReport:
    def test_the_report_is_written_again_from_the_folders(self, tmp_path: Path, finished_run: Path) -> None:
        shutil.copytree(finished_run, tmp_path / "run")
        (tmp_path / "run" / "report.md").unlink()
        again = CliRunner().invoke(app, ["report", str(tmp_path / "run")])
        assert again.exit_code == 0, again.stderr
        assert (tmp_path / "run" / "report.md").is_file()

    @pytest.mark.parametrize("command", [["report"], ["push", "--repo-id", "user/name"]])
    def test_a_folder_that_is_no_run_is_not_to_be_deleted(self, tmp_path: Path, command: list[str]) -> None:
        done = CliRunner().invoke(app, [*command, str(tmp_path)])
        assert done.exit_code == 1 and "Delete" not in done.stderr
        assert f"{tmp_path} is not the folder of a run: it has no recipe.json. Give the `output_dir`" in done.stderr

    def test_a_damaged_recipe_is_all_that_is_to_be_deleted(self, tmp_path: Path) -> None:
        (tmp_path / "recipe.json").write_text("{")
        done = CliRunner().invoke(app, ["report", str(tmp_path)])
        assert done.exit_code == 1 and "recipe.json is damaged" in done.stderr
        assert "Delete this file and run the recipe of this run again" in done.stderr

    def test_a_damaged_report_is_written_again_by_a_command(self, tmp_path: Path) -> None:
        (tmp_path / "report.json").write_text("{")
        done = CliRunner().invoke(app, ["push", "--repo-id", "user/name", str(tmp_path)])
        assert done.exit_code == 1 and "report.json is damaged" in done.stderr
        assert f"write the report again with `m2mkd report {tmp_path}`" in done.stderr.replace("\n", " ")
