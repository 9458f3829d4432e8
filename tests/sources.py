"""The sources of the package, as files and as syntax trees."""

import ast
import configparser
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]


def package_folders() -> dict[str, Path]:
    """The folder of each package, as setup.cfg maps them."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lines = parser["options"]["package_dir"].strip().splitlines()
    return {name.strip(): ROOT / folder.strip() for name, _, folder in (line.partition("=") for line in lines)}


MODULES = {
    package if path.stem == "__init__" else f"{package}.{path.stem}": path
    for package, folder in package_folders().items()
    for path in sorted(folder.glob("*.py"))
}
SOURCES = [*MODULES.values(), *sorted((ROOT / "benchmarks").glob("*.py")), ROOT / "train.py", ROOT / "__init__.py"]


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))
