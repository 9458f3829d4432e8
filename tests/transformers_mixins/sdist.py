"""
The test mixins of transformers, which are in its source distribution alone (CONTRIBUTING.md says how to get it). The
distribution leaves out the sub-folders of its tests; what the mixins import from there is put in its place here.
"""

import importlib
import os
import sys
import types
from pathlib import Path

import pytest


PACKAGE = "transformers_tests"


def load_mixins(name: str) -> types.ModuleType:
    """A file of the distribution's `tests` folder; without the distribution the module that asks is skipped."""
    folder = os.environ.get("TRANSFORMERS_SDIST")
    if folder is None:
        pytest.skip("TRANSFORMERS_SDIST names no source distribution of transformers", allow_module_level=True)
    pytest.importorskip("parameterized")
    if PACKAGE not in sys.modules:
        tests = Path(folder).resolve() / "tests"
        if not (tests / "test_modeling_common.py").is_file():
            raise FileNotFoundError(f"TRANSFORMERS_SDIST is {folder}, which holds no tests/test_modeling_common.py.")
        # one of the files executes it, and it is not in the distribution either
        (tests / "__init__.py").touch()
        stand_in(PACKAGE, __path__=[str(tests)])
        for part in ("exporters", "generation", "utils"):
            stand_in(f"{PACKAGE}.{part}", __path__=[])
        # the tests of export are not in the distribution; ours are in tests/modeling/test_export.py
        stand_in(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
        stand_in(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
        common = {
            "output_hidden_states": True,
            "output_attentions": True,
            "return_dict": False,
            "dtype": "float16",
            "id2label": {0: "label"},
            "label2id": {"label": 0},
            "problem_type": "regression",
        }
        stand_in(f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs=common)
    return importlib.import_module(f"{PACKAGE}.{name}")


def stand_in(name: str, **attributes: object) -> None:
    module = types.ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module
