"""The rooms of CONTRIBUTING.md and which may import which, read from the sources: nothing is imported or run here."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sources import MODULES, ROOT, SOURCES, tree_of


# What a room may import of ours, beside itself. The command line may import everything.
BELOW = {
    "configuration": set(),
    "modeling": {"configuration"},
    "errors": set(),
    "files": {"errors"},
    "screen": set(),
    "data": {"errors", "files"},
    "distillation": {"configuration", "modeling", "errors", "files"},
    "model_cards": {"data", "errors", "files"},
}
BELOW["conversion"] = {*BELOW["distillation"], "distillation"}
BELOW["evaluation"] = {*BELOW["conversion"], "data", "screen"}
BELOW["trainer"] = {*BELOW["evaluation"], "model_cards"}
BELOW["experiment"] = {*BELOW["trainer"], "trainer", "evaluation"}
BELOW["hub"] = {*BELOW["experiment"], "experiment"}
BELOW["overrides"] = {"errors", "experiment"}
BELOW["cli"] = {*BELOW["hub"], "hub", "conversion", "m2mkd", "overrides"}
BELOW["m2mkd_cli"] = {"cli"}
# The whole of what a folder may import beside the standard library: these two are shipped in a flat Hub folder.
CLOSED = {
    "configuration": {"torch", "transformers", "huggingface_hub"},
    "modeling": {"torch", "transformers", "huggingface_hub", "networkx", "scipy"},
}
LARGEST_FILE, LARGEST_CLASS, LARGEST_FUNCTION = 600, 250, 60


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and full dotted name of every absolute import, also of those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def room_of(module: str) -> str:
    """The room of one of our modules; `m2mkd` for the package itself."""
    return module.split(".")[1] if "." in module else module


def module_of(name: str) -> str | None:
    """The module of ours that an imported name is or lies in; `None` for others."""
    if not name.startswith("m2mkd"):
        return None
    return name if name in MODULES else name.rpartition(".")[0]


def is_allowed(room: str, name: str) -> bool:
    module = module_of(name)
    if module is not None:
        # the root package only registers and loads lazily: nothing of ours may import it
        return room_of(module) == room or room_of(module) in BELOW[room]
    return room not in CLOSED or name.split(".")[0] in {*sys.stdlib_module_names, *CLOSED[room]}


def is_in(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def report(path: Path, lines: list[tuple[int, str]]) -> str:
    return "\n".join(f"{path.relative_to(ROOT)}:{line}: {what}" for line, what in lines)


def length_of(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a class or function; the docstring of a class, which lists all fields, does not count."""
    length = node.end_lineno - node.lineno + 1
    if isinstance(node, ast.ClassDef) and ast.get_docstring(node):
        length -= node.body[0].end_lineno - node.body[0].lineno + 1
    return length


@pytest.fixture(params=SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def source(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def tree(source: Path) -> ast.Module:
    return tree_of(source)


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module) != "m2mkd"])
def test_imports_follow_the_order_of_the_rooms(module: str):
    path = MODULES[module]
    wrong = [(line, name) for line, name in imports(tree_of(path)) if not is_allowed(room_of(module), name)]
    assert not wrong, report(path, wrong)


def test_there_is_no_circle():
    # of all imports, those inside functions and under TYPE_CHECKING included
    waiting = {
        module: {other for _, name in imports(tree_of(path)) if (other := module_of(name)) in MODULES} - {module}
        for module, path in MODULES.items()
        # the root package loads its public names lazily, and nothing imports it
        if module != "m2mkd"
    }
    while ready := [module for module, needs in waiting.items() if not needs & waiting.keys()]:
        for module in ready:
            del waiting[module]
    assert not waiting, f"these modules import each other: {sorted(waiting)}"


@pytest.mark.parametrize(
    "module", ["m2mkd.conversion.convert", "m2mkd.conversion.to_official", "m2mkd.hub.code_export"]
)
def test_converting_and_exporting_need_no_training(module: str):
    needed, waiting = set(), [module]
    while waiting:
        found = {module_of(name) for _, name in imports(tree_of(MODULES[waiting.pop()]))} & MODULES.keys()
        waiting += found - needed
        needed |= found
    assert not {room_of(name) for name in needed} & {"trainer", "experiment"}


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


def test_no_branch_on_the_type_of_a_model(source: Path, tree: ast.AST):
    # What differs between architectures is a method or an attribute of a stage's class.
    def is_attribute(node: ast.AST, name: str) -> bool:
        return isinstance(node, ast.Attribute) and node.attr == name

    wrong = [
        (node.lineno, ast.unparse(node))
        for node in ast.walk(tree)
        if (isinstance(node, ast.Compare) and is_attribute(node.left, "model_type") and "'" in ast.unparse(node))
        or (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "isinstance"
            and is_attribute(node.args[0], "config")
        )
    ]
    assert not wrong, report(source, wrong)


def test_files_classes_and_functions_are_short(source: Path, tree: ast.Module):
    limits = {ast.ClassDef: LARGEST_CLASS, ast.FunctionDef: LARGEST_FUNCTION, ast.AsyncFunctionDef: LARGEST_FUNCTION}
    lengths = [(node, length_of(node)) for node in ast.walk(tree) if type(node) in limits]
    wrong = [
        (node.lineno, f"{node.name} has {length} lines") for node, length in lengths if length > limits[type(node)]
    ]
    length = len(source.read_text(encoding="utf-8").splitlines())
    wrong += [(length, "the file is too long")] if length > LARGEST_FILE else []
    assert not wrong, report(source, wrong)


@pytest.mark.parametrize(
    ("room", "name", "allowed"),
    [
        ("configuration", "transformers.PreTrainedConfig", True),
        ("configuration", "m2mkd.modeling.router_losses.load_loss", False),
        ("modeling", "m2mkd.configuration.configuration_vmoe.VMoEConfig", True),
        ("modeling", "m2mkd.VMoEConfig", False),
        ("modeling", "m2mkd.errors.StageError", False),
        ("modeling", "m2mkd.distillation.stage.Stage", False),
        ("modeling", "torchvision", False),
        ("distillation", "m2mkd.modeling.modeling_vmoe.VMoERouter", True),
        ("distillation", "m2mkd.data.config", False),
        ("data", "m2mkd.modeling", False),
        ("data", "PIL.Image", True),
        ("trainer", "m2mkd.experiment.recipe.Recipe", False),
        ("trainer", "m2mkd.model_cards.trainer_card", True),
        ("evaluation", "m2mkd.trainer.m2mkd_config", False),
        ("conversion", "m2mkd.trainer.m2mkd_config", False),
        ("experiment", "m2mkd.hub.push", False),
        ("hub", "m2mkd.experiment.report.read", True),
        ("hub", "m2mkd.cli", False),
        ("cli", "m2mkd.hub.push", True),
    ],
)
def test_the_rules_themselves(room: str, name: str, allowed: bool):
    assert is_allowed(room, name) is allowed
