"""What is in the repository is what gets installed, and under one name."""

import importlib
import shutil
import subprocess
import sys
import zipfile
from collections import defaultdict
from configparser import ConfigParser
from pathlib import Path

import pytest

import m2mkd


ROOT = Path(__file__).resolve().parents[1]
# Folders with Python files that are not part of the package.
NOT_PACKAGED = {"tests", "benchmarks"}


def setup_cfg() -> ConfigParser:
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def lines(value: str) -> list[str]:
    return [line for line in value.split("\n") if line and not line.startswith("#")]


def package_folders() -> dict[str, Path]:
    """Import name → folder, as setup.cfg maps them."""
    pairs = (line.split(" = ") for line in lines(setup_cfg()["options"]["package_dir"]))
    return {name: ROOT / folder for name, folder in pairs}


def module_files() -> dict[str, Path]:
    """Import name → file of every module of every package."""
    return {
        name if path.stem == "__init__" else f"{name}.{path.stem}": path
        for name, folder in package_folders().items()
        for path in folder.glob("*.py")
        if path.stem != "__main__"
    }


def test_packages_are_the_mapped_folders():
    assert lines(setup_cfg()["options"]["packages"]) == list(package_folders())


def test_every_package_folder_is_mapped():
    tops = [path for path in ROOT.iterdir() if path.is_dir() and path.name not in NOT_PACKAGED | {"build", "dist"}]
    # A virtual environment inside the checkout also holds packages.
    tops = [path for path in tops if not path.name.startswith(".") and not (path / "pyvenv.cfg").exists()]
    found = {path.parent for top in tops for path in top.rglob("__init__.py")}
    assert found == set(package_folders().values())


def test_every_python_file_is_in_a_package_folder():
    mapped = set(package_folders().values())
    for folder in mapped:
        stray = [path for path in folder.rglob("*.py") if path.parent not in mapped]
        assert not stray, f"Not in a package that setup.cfg lists, so not in the wheel: {stray}"


@pytest.mark.parametrize("library", ["datasets", "evaluate", "accelerate", "tokenizers", "transformers", "torch"])
def test_no_folder_shadows_a_library(library: str):
    # `accelerate launch train.py` puts the root of the repository first on sys.path.
    assert not (ROOT / library).exists()


# What a module may need that the test extra does not install.
EXTRAS = {"ray"}


def test_every_module_has_one_name():
    for name in module_files():
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            assert error.name in EXTRAS
    names = defaultdict(set)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and Path(file).is_relative_to(ROOT):
            names[file].add(name)
    assert {file: found for file, found in names.items() if len(found) > 1} == {}


def test_import_needs_no_trainer():
    code = "import sys, m2mkd; print(*[name for name in sys.modules if name.startswith('m2mkd.')])"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "m2mkd.modeling" in output.split()
    assert not [name for name in output.split() if name.startswith(("m2mkd.trainer", "m2mkd.data"))]


def test_a_clone_called_m2mkd_is_the_package_where_python_starts_above_it(tmp_path: Path):
    clone = tmp_path / "m2mkd"
    for folder in package_folders().values():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(folder, clone / folder.relative_to(ROOT), ignore=ignored, dirs_exist_ok=True)
    shutil.copy(ROOT / "__init__.py", clone)
    code = "import m2mkd, m2mkd.data; from m2mkd import NACConfig; print(m2mkd.__file__, m2mkd.data.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(clone / "src/m2mkd/__init__.py"), str(clone / "data/__init__.py")]


def test_version_is_one_and_readable_without_import():
    text = (ROOT / "src/m2mkd/__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{m2mkd.__version__}"' in text


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in a wheel, built with the installed setuptools (no network) from a copy (no build/ left here)."""
    copy = tmp_path_factory.mktemp("wheel") / "copy"
    copy.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "train.py"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, copy)
    for folder in package_folders().values():
        shutil.copytree(
            folder, copy / folder.relative_to(ROOT), ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
        )
    command = [sys.executable, "-c", "from setuptools.build_meta import build_wheel; build_wheel('out')"]
    done = subprocess.run(command, check=False, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = (copy / "out").glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        return set(archive.namelist())


def test_wheel_has_every_file_of_the_packages(wheel: set[str]):
    expected = {
        f"{name.replace('.', '/')}/{path.name}"
        for name, folder in package_folders().items()
        for path in folder.iterdir()
        if path.is_file() and path.suffix != ".pyc"
    }
    assert expected <= wheel
    assert "m2mkd/py.typed" in wheel


def test_wheel_has_nothing_else(wheel: set[str]):
    others = {name for name in wheel if ".dist-info/" not in name}
    folders = {name.replace(".", "/") for name in package_folders()}
    assert {name.rpartition("/")[0] for name in others} <= folders
