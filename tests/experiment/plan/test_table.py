import pytest
from rich.console import Console

from m2mkd.experiment.plan.costs import PhaseCost
from m2mkd.experiment.plan.plan import Plan
from m2mkd.experiment.plan.table import print_plan


def test_phases_and_hours_against_e2e(capsys: pytest.CaptureFixture[str]) -> None:
    phases = [
        PhaseCost(
            "pair 0", 5_000_000, 20_000_000, images=1000, epochs=2, batch=64, flops_per_image=3e12, memory=2**30
        ),
        PhaseCost("arm e2e", 5_000_000, 0, images=1000, epochs=4, batch=64, flops_per_image=1.35e13, memory=2**31),
    ]
    # 150 TFLOP/s are 5.4e17 FLOPs an hour
    totals = {"e2e": 5.4e16, "m2mkd": 5.4e16 * 2.5}
    print_plan(Plan("tiny", phases, totals, gpus=8), 150.0, "stated", Console(width=200))
    lines = capsys.readouterr().out.splitlines()
    assert any("Plan of tiny on 8 GPUs" in line for line in lines)
    assert any("at 150 TFLOP/s a GPU (stated)" in line for line in lines)
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]] for line in lines if "│" in line
    }
    # 16 steps of 64 images an epoch
    assert rows["pair 0"] == ["5.0 M", "20.0 M", "1,000", "2", "64", "32", "3,000", "0.006", "1"]
    assert rows["e2e"] == ["0.054", "0.1", "0.0125", "1.00"]
    assert rows["m2mkd"] == ["0.135", "0.25", "0.0312", "2.50"]
