"""The picture of a report: its panels and what they are drawn from."""

import io
import math
from typing import Any

import pytest
from PIL import Image

from m2mkd.experiment.arms import ArmSpec, named_specs, resolve
from m2mkd.experiment.report.figure import arm_curves, pair_curves, render_figure


LOG = [{"epoch": 1.0, "loss": 2.0}, {"epoch": 1.0, "eval_accuracy": 0.3}, {"epoch": 2.0, "eval_accuracy": 0.4}]
HISTORIES = {"arms": {"e2e": {0: LOG}, "m2mkd": {0: LOG}}, "pairs": {"0": [{"epoch": 1.0, "pair_0_accuracy": 0.5}]}}


def report() -> dict[str, Any]:
    """What the picture needs of a report of one seed."""
    specs = {name: ArmSpec.model_validate(spec) for name, spec in named_specs(["e2e", "m2mkd"]).items()}
    arms = resolve(specs, equal_compute=False)
    load = {"1": [0.75, 0.25], "11": [0.5, 0.5]}
    return {
        "recipe": {"name": "tiny"},
        "seed": 0,
        "seeds": {"0": {}},
        "teacher": {"iid": {"accuracy": 0.9}, "ood": None},
        "arms": {
            name: {
                "arm": arm.described(),
                "expert_load": load if name == "m2mkd" else None,
                "train_flops": 8e12,
                "epochs": 2.0,
                "phases": {"distill": {"train_flops": 5e12}, "finetune": {"train_flops": 3e12, "epochs": 2.0}},
            }
            for name, arm in arms.items()
        },
        "summary": {name: {"iid": {"mean": 0.5, "std": None}, "ood": None} for name in arms},
    }


class TestRenderFigure:
    @pytest.mark.parametrize(
        ("without", "size"),
        [
            ((), (1540, 990)),
            (("load",), (1540, 990)),
            (("load", "arms"), (1540, 528)),
            (("load", "arms", "pairs"), (990, 528)),
        ],
        ids=["four", "three", "two", "one"],
    )
    def test_a_panel_without_data_is_left_out(self, without: tuple[str, ...], size: tuple[int, int]) -> None:
        content = report()
        if "load" in without:
            content["arms"]["m2mkd"]["expert_load"] = None
        histories = {name: log for name, log in HISTORIES.items() if name not in without}
        with Image.open(io.BytesIO(render_figure(content, histories))) as picture:
            assert picture.size == size


class TestCurves:
    def test_an_arm_that_another_stands_for_has_none_of_its_own(self) -> None:
        content = report()
        content["arms"]["e2e"]["same_as"] = "m2mkd"
        # after one of two epochs: the 5 TFLOPs of the distillation, and half of the 3 of the end-to-end phase
        assert arm_curves(content, HISTORIES) == {"m2mkd": {"0": ([6.5, 8.0], [30.0, 40.0])}}

    def test_training_accuracy_of_pairs_that_were_not_evaluated(self) -> None:
        logs = {"10": [{"epoch": 1.0, "pair_10_accuracy": 0.5}], "9": [{"epoch": 2.0, "pair_9_accuracy": math.nan}]}
        assert pair_curves({"pairs": logs}) == ({10: ([1.0], [50.0])}, "accuracy on training batches")

    def test_pairs_without_logits_show_the_error_of_their_hidden_states(self) -> None:
        log = [{"epoch": 1.0, "pair_0_boundary_error": 0.2, "eval_accuracy": 0.5}]
        assert pair_curves({"pairs": {"0": log}}) == (
            {0: ([1.0], [20.0])},
            "squared error of hidden states, of their variance",
        )

    def test_a_test_set_comes_before_training_batches(self) -> None:
        log = [{"epoch": 1.0, "pair_0_accuracy": 0.5}, {"epoch": 1.0, "eval_pair_0_accuracy": 0.25}]
        assert pair_curves({"pairs": {"0": log}}) == ({0: ([1.0], [25.0])}, "IID accuracy")
