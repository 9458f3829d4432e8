"""
README, docs/ and the hand-written cards: every code block does what it says, every link leads somewhere. (Generated
cards: test_cards, test_push, test_student_trainer.)
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from configparser import ConfigParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from jax_files import write_checkpoint
from jax_vmoe import tree
from official_nac_cases import nac_case
from PIL import Image
from study_figures import facts, rows
from testing_utils import code_blocks, commands, vit
from tiny_run import write_images
from typer.testing import CliRunner

import m2mkd
from m2mkd.cli import app
from m2mkd.errors import M2MKDError
from m2mkd.experiment.recipe_file import load_recipe, parse_recipe
from m2mkd.experiment.run_data import RunData
from m2mkd.overrides import parse_overrides


ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*PAGES, *sorted((ROOT / "model_cards").glob("digits_*.md"))]
# What makes minutes into seconds.
QUICK = ["--training.max_steps", "2", "--equal_compute", "false", "--data.train.samples_per_class", "4"]
DIGITS = [
    *("--data.labelled.samples_per_class", "2"),
    *("--data.iid.samples_per_class", "2", "--data.ood.samples_per_class", "2"),
]
# They take no time, and are no values of a recipe.
SWITCHES = {"--plan", "--miniature", "--gpus"}
# Words of commands that need more than this machine (test_many_machines) or an extra (tests/hub/test_space.py).
ELSEWHERE = {"--space", "ray", "hf", "make", "UV_FIND_LINKS=dist", "--study"}
LAUNCHERS = {"accelerate": ("accelerate.commands.launch", 2), "torchrun": ("torch.distributed.run", 1)}


def all_commands() -> list[list[str]]:
    found = [words for document in DOCUMENTS for words in commands(document.read_text(encoding="utf-8"))]
    return [words for words in found if ELSEWHERE.isdisjoint(words)]


def runs() -> list[list[str]]:
    """The commands that take a recipe and start no processes, each once."""
    found = [words for words in all_commands() if "train.py" in words or words[:2] == ["m2mkd", "run"]]
    found = [words for words in found if "--accelerate" not in words]
    # that of m2mkd init: tests/experiment/test_new_recipe.py
    found = [words for words in found if "mine.yaml" not in words]
    return [words for index, words in enumerate(found) if words not in found[:index]]


def trainings() -> list[list[str]]:
    """Those of them that train as long as the recipe says, all phases."""
    return [words for words in runs() if SWITCHES.isdisjoint(words) and "--phase" not in words]


def recipe_arguments(words: list[str]) -> list[str]:
    last = words.index("train.py") if "train.py" in words else words.index("run")
    return words[last + 1 :]


@pytest.fixture
def folder(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with what the blocks read: runs, a picture, checkpoints, a recipe's images."""
    for name in ("digits", "nac_digits", "mine", "image_folder"):
        shutil.copytree(finished_run, tmp_path / "runs" / name)
        shutil.copytree(finished_run / "arms" / "m2mkd", tmp_path / "runs" / name / "arms" / "m2mkd_kd")
    for seed, name in enumerate(("test", "sketches")):
        write_images(tmp_path / name, seed=seed)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "image.png")
    case = nac_case("nac_small_eval")
    shutil.copy(case.folder / "config.json", tmp_path / "nac_scale_tinyimnet_config.yml")
    torch.save({"model": case.state_dict, "model_ema": None}, tmp_path / "checkpoint_best.pt")
    write_checkpoint(tmp_path / "vmoe_b16_imagenet21k_randaug_strong", tree(), num_shards=2)
    (tmp_path / "model.json").write_text(json.dumps({"model": {"encoder": {"moe": {"group_size": 20}}}}))
    (tmp_path / "checkpoints").mkdir()
    write_checkpoint(tmp_path / "checkpoints" / "ckpt_10000", {f"params/{name}": p for name, p in tree().items()})
    vit_jax = ROOT / "tests" / "conversion" / "vmoe_jax" / "init_from_vit_same_size_all_moe" / "source.npz"
    shutil.copy(vit_jax, tmp_path / "B_16-i21k.npz")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if "```python" in path.read_text()], ids=lambda p: p.stem
)
def test_the_python_blocks_run_one_after_the_other(document: Path, folder: Path) -> None:
    # that of the embedded recipe, which the blocks cut
    vit(num_hidden_layers=4, image_size=27, patch_size=9, num_labels=10).save_pretrained("runs/digits/teacher")
    names: dict[str, Any] = {}
    for index, script in enumerate(code_blocks(document.read_text(encoding="utf-8"), "python")):
        path = folder / f"block_{index}.py"
        path.write_text(script)
        names = {**names, **runpy.run_path(str(path), init_globals=names)}
    if document.stem == "models":
        # the last stage returns the model's own logits
        with torch.no_grad():
            assert torch.equal(names["hidden_states"], names["model"](names["pixel_values"]).logits)
    elif document.stem == "python":
        assert names["trainer"].state.global_step > 0
    elif document.stem == "hub":
        assert (folder / "runs" / "digits" / "arms" / "m2mkd_kd" / "modeling_vmoe.py").is_file()


def test_the_commands_that_train_nothing_run(folder: Path) -> None:
    ran = set()
    write_images(folder / "PATH", per_class=10)
    for words in all_commands():
        if words[0] == "m2mkd" and words[1] != "run":
            for made in ("mine.yaml", "student.png"):
                (folder / made).unlink(missing_ok=True)
            # where a shell writes the output does not matter
            done = CliRunner().invoke(app, words[1 : words.index(">") if ">" in words else None])
            assert done.exit_code == 0, f"{words}: {done.output}"
            ran.add(words[1])
            shutil.rmtree("student", ignore_errors=True)
    assert ran == {"assemble", "convert", "evaluate", "few-shot", "init", "inspect", "push", "report", "slurm"}


def test_the_recipes_and_overrides_of_the_others_are_valid() -> None:
    assert len(trainings()) > 5
    for words in trainings():
        arguments = recipe_arguments(words)
        has_recipe = bool(arguments) and not arguments[0].startswith("--")
        path, options = (ROOT / arguments[0], arguments[1:]) if has_recipe else (None, arguments)
        load_recipe(path, parse_overrides(options))


@pytest.mark.parametrize(
    ("recipe", "sizes"),
    [("image_folder", {"train": 27, "iid": 3}), ("image_folders", {"train": 30, "iid": 30, "ood": 30})],
)
def test_the_commands_for_own_images_lose_none(recipe: str, sizes: dict[str, int], tmp_path: Path) -> None:
    (words,) = [words for words in trainings() if f"recipes/{recipe}.yaml" in words]
    options = [word.replace(":PATH", f":{tmp_path}/PATH") for word in recipe_arguments(words)[1:]]
    for source in (word.partition(":")[2] for word in options if word.startswith("imagefolder:")):
        write_images(Path(source), per_class=10)
    data = RunData(load_recipe(ROOT / "recipes" / f"{recipe}.yaml", parse_overrides(options)))
    data.check()
    assert {name: data.size(name)[0] for name in data.recipe.used_data()} == sizes


def test_the_sections_of_recipes_are_valid() -> None:
    sections = [yaml.safe_load(block) for page in PAGES for block in code_blocks(page.read_text(), "yaml")]
    assert len(sections) > 1
    recipe = load_recipe(ROOT / "recipes" / "vmoe_base_imagenet.yaml").model_dump(mode="json")
    for own in sections:
        parse_recipe({**recipe, **own}, "docs")


def test_the_commands_with_a_switch_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # one of each kind and recipe: tests of the plan try its options
    kinds = {
        ("--plan" in words, recipe_arguments(words)[0]): words
        for words in reversed(runs())
        if not SWITCHES.isdisjoint(words)
    }
    quick = list(kinds.values())
    assert {word for words in quick for word in words} >= {"--plan", "--miniature"}
    monkeypatch.chdir(ROOT)
    for index, words in enumerate(quick):
        own = tmp_path / str(index)
        arguments = ["run", *recipe_arguments(words), "--output_dir", str(own / "run")]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, f"{words}: {done.output}"
        if "--plan" in words:
            assert "In total, at" in done.output and not own.exists()
        else:
            assert (own / "run-miniature" / "run" / "report.md").is_file()


def test_the_commands_with_several_processes_start_them(monkeypatch: pytest.MonkeyPatch) -> None:
    execv = Mock(side_effect=SystemExit)
    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    monkeypatch.chdir(ROOT)
    several = [words for words in all_commands() if "--accelerate" in words]
    assert len(several) > 2
    for words in several:
        CliRunner().invoke(app, words[1:])
        started = launch_command_parser().parse_args(execv.call_args.args[1][3:])
        name = words.index("--accelerate")
        assert Path(started.config_file).stem == words[name + 1] and started.num_processes == 8
        assert [started.training_script, *started.training_script_args] == [
            *("m2mkd.cli", *words[1:name], *words[name + 2 :])
        ]


def test_what_is_to_be_installed_is_there() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for words in all_commands():
        if words[0] == "pip":
            extras = [name for word in words for name in re.findall(r"\[(\w+)\]", word)]
            assert set(extras) <= set(setup["options.extras_require"]), words
            constraints = [word for option, word in pairwise(words) if option == "-c"]
            assert all((ROOT / name).is_file() for name in constraints), words
        elif words[0] == "python" and words[1] != "demo/app.py":  # which tests/hub/test_space.py runs
            script = (ROOT / words[1]).read_text(encoding="utf-8")
            assert all(f'"{word}"' in script for word in words if word.startswith("--")), words
    kinds = {words[0] for words in all_commands()}
    # servers of trackers, which would not end
    assert kinds <= {"pip", "pytest", "python", "m2mkd", "tensorboard", "trackio", *LAUNCHERS}, (
        "a command of a kind that no test runs"
    )


@pytest.mark.slow
@pytest.mark.parametrize("words", trainings(), ids=" ".join)
def test_the_commands_that_train_run(words: list[str], tmp_path: Path) -> None:
    """As they stand, but for the sizes, the folder of the run and the reader's own images."""
    own_folders = [word.partition(":PATH")[2] for word in words if ":PATH" in word]
    for folder in set(own_folders):
        write_images(tmp_path / f"PATH{folder}", per_class=40)
    module, skipped = LAUNCHERS.get(words[0], ("m2mkd.cli", 1))
    words = [word.replace(":PATH", f":{tmp_path}/PATH") for word in words[skipped:]]
    sizes = [] if own_folders else DIGITS
    quick = [*QUICK, *sizes, "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", module, *words, *quick],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "recipe.json").is_file()


@pytest.mark.slow
def test_the_phases_by_hand_run_one_after_the_other(tmp_path: Path) -> None:
    by_hand = [words for words in runs() if "--phase" in words]
    assert len(by_hand) > 3
    for words in by_hand:
        command = [sys.executable, "-m", "m2mkd.cli", *words[1:], *QUICK, *DIGITS[2:], "--output_dir", str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0 and (tmp_path / words[-1] / "train_results.json").is_file(), done.stderr[-3000:]
    assert (tmp_path / "report.md").is_file()


def test_the_figures_of_the_studies_are_those_of_the_committed_results() -> None:
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for study in ("vmoe_digits", "vmoe_digits_deep", "vmoe_glyphs", "nac_digits"):
        assert "\n".join(rows(study)) in results
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    quoted = [line for line in readme.splitlines() if re.match(r"\| `\w+` \|.* ± ", line)]
    assert len(quoted) == 2 and set(quoted) <= set(rows("vmoe_digits"))
    for text, page in ((readme, "README.md"), (results, "docs/results.md")):
        for fact in facts(page):
            assert fact in " ".join(text.split()), page


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "docs" / "reference").glob("*.md"))], ids=lambda p: p.stem)
def test_the_links_lead_somewhere(page: Path) -> None:
    """To a file of the repository and, from docs/, of the site; the site's own build checks the anchors too."""
    targets = re.findall(r"\]\((?!https?://)([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    root = ROOT if page.name == "README.md" else ROOT / "docs"
    for target in targets:
        path = (page.parent / target).resolve()
        assert path.exists() and path.is_relative_to(root), target


def test_every_kind_of_error_has_a_section() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (\w+)$", page, re.MULTILINE)
    assert sorted(sections) == sorted(kind.__name__ for kind in M2MKDError.__subclasses__())


def test_every_public_name_is_in_the_python_reference() -> None:
    page = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: .*\.(\w+)$", page, re.MULTILINE)) == sorted(m2mkd.__all__)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "docs" / "first_steps.ipynb", as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = "TEACHER_EPOCHS, MODULE_EPOCHS, KD_EPOCHS, IMAGES_PER_CLASS = 1, 1, 1, 2"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    assert (tmp_path / "student.png").is_file() and (tmp_path / "smaller" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["recipe.md", "cli.md"])
def test_the_generated_references_are_current(name: str) -> None:
    """After a change of a recipe's keys or of a command, run `python docs/generate_reference.py`."""
    pages = runpy.run_path(str(ROOT / "docs" / "generate_reference.py"))["PAGES"]
    assert (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8") == pages[name]().rstrip() + "\n"
