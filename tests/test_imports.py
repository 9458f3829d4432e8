"""The import direction of CONTRIBUTING.md, read from the sources: nothing is imported or run here."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ["configuration", "modeling", "trainer", "data", "model_cards", "src", "benchmarks"]
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
SOURCES += [ROOT / "train.py", ROOT / "__init__.py"]
# The whole of what a folder may import beside the standard library: these two are shipped in a flat Hub folder.
CLOSED = {
    "configuration": {"torch", "transformers", "huggingface_hub", "m2mkd.configuration"},
    "modeling": {
        *("torch", "transformers", "huggingface_hub", "safetensors", "networkx", "scipy"),
        *("m2mkd.configuration", "m2mkd.modeling"),
    },
}
# Of the other folders only what they may not import is fixed.
FORBIDDEN = {
    "data": {"m2mkd.trainer", "m2mkd.modeling"},
    "model_cards": {"m2mkd"},
}


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and full dotted name of every absolute import, also of those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def is_in(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def is_allowed(folder: str, name: str) -> bool:
    if folder in CLOSED:
        return name.split(".")[0] in sys.stdlib_module_names or is_in(name, CLOSED[folder])
    return not is_in(name, FORBIDDEN.get(folder, set()))


def report(path: Path, lines: list[tuple[int, str]]) -> str:
    return "\n".join(f"{path.relative_to(ROOT)}:{line}: {what}" for line, what in lines)


@pytest.fixture(params=SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def source(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def tree(source: Path) -> ast.AST:
    return ast.parse(source.read_text(encoding="utf-8"))


def test_imports_follow_the_direction(source: Path, tree: ast.AST):
    folder = source.relative_to(ROOT).parts[0]
    wrong = [(line, name) for line, name in imports(tree) if not is_allowed(folder, name)]
    assert not wrong, report(source, wrong)


def test_no_torchvision(source: Path, tree: ast.AST):
    # It has no build for every torch that we support, and its binary has to match torch's exactly.
    wrong = [(line, name) for line, name in imports(tree) if is_in(name, {"torchvision"})]
    assert not wrong, report(source, wrong)


def test_no_relative_import(source: Path, tree: ast.AST):
    # Saving a model with its code follows relative imports as if all files lay in one folder, and fails across ours.
    wrong = [(n.lineno, "relative import") for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
    assert not wrong, report(source, wrong)


def test_no_assert(source: Path, tree: ast.AST):
    # `python -O` drops them; an error for a user is a `raise` that says value, rule and way out.
    wrong = [(node.lineno, "assert") for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert not wrong, report(source, wrong)


def test_networkx_is_imported_lazily(source: Path, tree: ast.Module):
    # Only a new NAC draws a graph; loading one should not pay for the import.
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    wrong = [(line, name) for node in top for line, name in imports(node) if is_in(name, {"networkx"})]
    assert not wrong, report(source, wrong)


@pytest.mark.parametrize(
    ("folder", "name", "allowed"),
    [
        ("configuration", "transformers.PreTrainedConfig", True),
        ("configuration", "m2mkd.modeling.losses", False),
        ("modeling", "m2mkd.configuration.configuration_vmoe.VMoEConfig", True),
        ("modeling", "m2mkd.VMoEConfig", False),
        ("modeling", "m2mkd.trainer", False),
        ("modeling", "torchvision", False),
        ("data", "m2mkd.modeling", False),
        ("data", "PIL.Image", True),
        ("model_cards", "m2mkd.data", False),
        ("trainer", "m2mkd.modeling.losses", True),
    ],
)
def test_the_rules_themselves(folder: str, name: str, allowed: bool):
    assert is_allowed(folder, name) is allowed
