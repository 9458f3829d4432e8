"""NAC cases of the official code: those in `official/`, and those next to the repository if there are any."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from official_cases import FOLDER, Case

from m2mkd import NACForImageClassification
from m2mkd.conversion.official_nac import convert_nac, nac_config


SHARED = Path(__file__).parents[3] / "shared" / "fixtures"


def nac_case(name: str) -> Case:
    """A case by name; skips the test if the case is neither committed nor next to the repository."""
    for folder in (FOLDER / name, SHARED / name):
        if folder.is_dir():
            return Case(str(folder))
    pytest.skip(f"the case {name} is not committed, and {SHARED} is not there")


def nac(case: Case, **overrides: Any) -> NACForImageClassification:
    """The official network. Its signatures come from its weights, so no graph is fitted."""
    no_fit = {"graph_prior": None, "graph_prior_kwargs": None, "graph_prior_truncation": None}
    config = nac_config(case.config["kwargs"], **{**no_fit, **overrides})
    model = NACForImageClassification(config)
    model.load_state_dict(convert_nac(case.state_dict, config.share_propagators), strict=True)
    return model.eval()


@contextmanager
def recorded_noise(case: Case) -> Iterator[None]:
    """Replay the random numbers of the official code in their order; kinds and shapes must be the same."""
    inputs = case.inputs
    left = [(name, inputs[f"noise.{name}"]) for name in case.config["noise_order"]]

    def take(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
        name, noise = left.pop(0)
        assert name.split(":")[1].split("#")[0] == kind, f"the official code draws {name} here, ours {kind}"
        assert tuple(noise.shape) == tuple(shape), f"{name} is {tuple(noise.shape)}, ours {tuple(shape)}"
        return noise.clone()

    def shape_of(sizes: tuple[Any, ...]) -> tuple[int, ...]:
        return tuple(sizes) if isinstance(sizes[0], int) else tuple(sizes[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *sizes, **_: take("rand", shape_of(sizes)))
        patch.setattr(torch, "randn", lambda *sizes, **_: take("randn", shape_of(sizes)))
        patch.setattr(
            torch.Tensor, "exponential_", lambda tensor, *_, **__: tensor.copy_(take("exponential", tensor.shape))
        )
        yield
    assert not left, f"ours drew nothing for {[name for name, _ in left]}"
