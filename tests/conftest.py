"""Shared set-up: no network, few threads, no state left between tests."""

import os
from collections.abc import Iterator

import pytest
import torch


os.environ["HF_HUB_OFFLINE"] = "1"
# the networks are tiny: threads that wait for each other cost more than they compute, in other processes too
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_random_numbers_whatever_ran_before() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
