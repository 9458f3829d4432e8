"""A finished run, made once for all tests that only read it."""

from pathlib import Path

import pytest
from tiny_run import tiny_recipe

from m2mkd.trainer.runner import run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run with the arms e2e and m2mkd; not to be written to."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("finished"), arms=["e2e", "m2mkd"], equal_compute=False)
    run(recipe)
    return Path(recipe.output_dir)
