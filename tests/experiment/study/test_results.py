"""Comparisons at equal compute."""

import math

import pytest

from m2mkd.experiment.study.results import compare, judged


def curve(*points: tuple[float, list[float]]) -> dict:
    """Points of (FLOPs, accuracies by seed)."""
    return {
        "points": [
            {
                "values": {"epochs": index},
                "seeds": {
                    str(seed): {"train_flops": flops, "iid": value, "ood": None} for seed, value in enumerate(values)
                },
            }
            for index, (flops, values) in enumerate(points)
        ]
    }


def test_equal_budgets_are_compared_as_measured_seed_by_seed() -> None:
    curves = {"kd": curve((1e12, [0.5, 0.6]), (2e12, [0.7, 0.8])), "ours": curve((2.02e12, [0.75, 0.83]))}
    (entry,) = compare(curves, "kd")
    assert (entry["curve"], entry["baseline"], entry["is_interpolated"]) == ("ours", "kd", False)
    assert entry["iid"]["differences"] == pytest.approx([0.05, 0.03])
    assert entry["ood"] is None


def test_between_two_budgets_the_baseline_is_interpolated_in_the_logarithm() -> None:
    curves = {"kd": curve((1e12, [0.5]), (4e12, [0.7])), "ours": curve((2e12, [0.65]))}
    (entry,) = compare(curves, "kd")
    # 2 is half way between 1 and 4
    assert entry["is_interpolated"] and entry["iid"]["mean"] == pytest.approx(0.05)


@pytest.mark.parametrize("flops", [0.5e12, 9e12])
def test_a_budget_that_the_baseline_does_not_cover_is_not_compared(flops: float) -> None:
    assert compare({"kd": curve((1e12, [0.5]), (4e12, [0.7])), "ours": curve((flops, [0.65]))}, "kd") == []


def test_the_interval_is_that_of_students_t() -> None:
    found = judged([0.01, 0.02, 0.03])
    # t of 2 degrees of freedom: 4.303; the standard error is 0.01 / sqrt(3)
    half = 4.303 * 0.01 / math.sqrt(3)
    assert found["interval"] == pytest.approx([0.02 - half, 0.02 + half], abs=1e-5)
    assert found["verdict"] == "not told apart"


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [([0.02, 0.021, 0.019], "better"), ([-0.02, -0.021, -0.019], "worse"), ([0.02], "not told apart")],
)
def test_a_verdict_needs_an_interval_without_0(differences: list[float], verdict: str) -> None:
    assert judged(differences)["verdict"] == verdict
