import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_run import recipe_content

from m2mkd.errors import RecipeError
from m2mkd.experiment.launch import launch


def run(folder: Path, name: str) -> subprocess.CompletedProcess[str]:
    """A tiny recipe in two processes, as a user types it."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_content(folder)))
    command = [sys.executable, "-m", "m2mkd.cli", "run", str(path), "--gpus", "2", "--accelerate", name]
    return subprocess.run([*command, "--phase", "meta"], capture_output=True, text=True, timeout=300, check=False)


class TestLaunch:
    def test_an_unknown_name_lists_the_known_ones(self) -> None:
        with pytest.raises(RecipeError, match="'fsdp', but there are only ddp, deepspeed_zero2, .*, fsdp2"):
            launch("fsdp", 2, ["run"])

    def test_deepspeed_must_be_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("m2mkd.experiment.launch.is_deepspeed_available", lambda: False)
        with pytest.raises(RecipeError, match="pip install deepspeed"):
            launch("deepspeed_zero2", 2, ["run"])

    def test_a_launched_process_does_not_launch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOCAL_RANK", "0")
        with pytest.raises(RecipeError, match="a launcher has already started this one"):
            launch("ddp", 2, ["run"])

    def test_without_gpus_there_is_nothing_to_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
        with pytest.raises(RecipeError, match="a process per GPU, but there is none here"):
            launch("ddp", None, ["run"])

    @pytest.mark.slow
    def test_two_processes_train_together(self, tmp_path: Path) -> None:
        done = run(tmp_path, "ddp")
        assert done.returncode == 0, done.stderr
        results = json.loads((tmp_path / "run" / "meta" / "train_results.json").read_text())
        # 2 epochs of 24 images, 6 in each of the processes
        assert results["log_history"][-1]["step"] == 4

    @pytest.mark.slow
    def test_shards_on_a_cpu_are_refused(self, tmp_path: Path) -> None:
        done = run(tmp_path, "fsdp2")
        assert done.returncode != 0
        assert "FSDP was asked for, but accelerate shards only on GPUs, not on cpu. Use DDP." in done.stderr
