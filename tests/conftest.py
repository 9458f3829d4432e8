"""Shared set-up: no network, few threads, no state left between tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import constants
from local_hub import LocalHub
from tiny_run import tiny_recipe

from m2mkd.experiment.runner import run


os.environ["HF_HUB_OFFLINE"] = "1"
# read from the environment when it was imported, above
constants.HF_HUB_OFFLINE = True
# the networks are tiny: threads that wait for each other cost more than they compute, in other processes too
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_random_numbers_whatever_ran_before() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run with the arms e2e and m2mkd; not to be written to."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("finished"), arms=["e2e", "m2mkd"], equal_compute=False)
    run(recipe)
    return Path(recipe.output_dir)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    """A Hub on this machine that the libraries in this process take for the Hub; alice is logged in."""
    with LocalHub({"hf_alice": "alice", "hf_bob": "bob"}) as hub:
        for name, value in hub.environment(str(tmp_path / "hf"), "hf_alice").items():
            monkeypatch.setenv(name, value)
        # what huggingface_hub and transformers made of the environment when they were imported
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        yield hub
