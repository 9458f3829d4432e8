"""The meta model with one stage of the teacher in it, and what its accuracy says of both."""

from typing import Any

import numpy as np
import pytest
import torch
from testing_utils import NoiseImages, run_chain, vit

from m2mkd import split_into_stages
from m2mkd.errors import RunError
from m2mkd.evaluation.hybrids import check_teacher, hybrid_accuracies, judge_hybrids


TEACHER_DEPTHS, META_DEPTHS = [2, 2, 2], [1, 1, 1]


class TestHybridAccuracies:
    def test_they_are_those_of_the_composed_networks(self) -> None:
        teacher, meta = vit(seed=2, num_hidden_layers=6), vit(seed=1)
        theirs, own = split_into_stages(teacher, TEACHER_DEPTHS), split_into_stages(meta, META_DEPTHS)
        images = NoiseImages()
        found = hybrid_accuracies(own, theirs, [0, 2], images, batch_size=3, use_cpu=True)
        batch = [images[index] for index in range(len(images))]
        pixel_values = torch.stack([item["pixel_values"] for item in batch])
        labels = torch.tensor([int(item["labels"]) for item in batch])

        def accuracy(chain: list[Any]) -> float:
            with torch.no_grad():
                return (run_chain(chain, pixel_values).argmax(dim=-1) == labels).float().mean().item()

        assert found["hybrids"] == pytest.approx(
            {"0": accuracy([theirs[0], *own[1:]]), "2": accuracy([*own[:2], theirs[2]])}
        )
        assert found["teacher"] == pytest.approx(accuracy(theirs))
        # of the classes that the set can have only
        images.possible = np.array([1, 3])
        among = hybrid_accuracies(own, theirs, [0], images, batch_size=3, use_cpu=True)["teacher"]
        with torch.no_grad():
            logits = run_chain(theirs, pixel_values)
        chosen = torch.where(logits[:, 3] > logits[:, 1], 3, 1)
        assert among == pytest.approx((chosen == labels).float().mean().item())
        assert found["chance"] == labels.bincount().max().item() / len(labels) and found["n"] == len(images)


@pytest.mark.parametrize(
    "accuracy, teacher, n, noise, weak",
    [
        (0.1, 0.9, 1000, ["1"], []),
        (0.4, 0.9, 1000, [], ["1"]),
        (0.8, 0.9, 1000, [], []),
        (0.1, 0.11, 1000, [], []),
        # too few images to be sure
        (0.1, 0.5, 8, [], ["1"]),
    ],
)
def test_hybrids_are_judged_between_chance_and_the_teachers_own(
    accuracy: float, teacher: float, n: int, noise: list[str], weak: list[str]
) -> None:
    measured = {"hybrids": {"1": accuracy}, "teacher": teacher, "chance": 0.1, "n": n}
    assert judge_hybrids(measured) == (noise, weak)


class TestCheckTeacher:
    @staticmethod
    def measured(teacher: float, n: int) -> dict[str, Any]:
        return {"hybrids": {"0": 0.1}, "teacher": teacher, "chance": 0.1, "n": n, "set": "IID test set"}

    def test_one_that_is_no_better_than_chance_is_refused(self) -> None:
        with pytest.raises(RunError, match=r"right on 11.0 % of 1,000 images \(IID test set\), .*chance \(10.0 %\)"):
            check_teacher(self.measured(0.11, 1000))

    def test_few_images_are_a_reason_to_warn_alone(self) -> None:
        assert "too few images to be sure" in check_teacher(self.measured(0.11, 30))

    def test_a_better_one_is_let_pass(self) -> None:
        assert check_teacher(self.measured(0.2, 1000)) is None
