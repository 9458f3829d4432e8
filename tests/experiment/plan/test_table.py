import pytest
from rich.console import Console

from m2mkd.experiment.plan.costs import PhaseCost
from m2mkd.experiment.plan.plan import Plan
from m2mkd.experiment.plan.table import print_plan


def test_phases_and_hours_against_e2e(capsys: pytest.CaptureFixture[str]) -> None:
    phases = [
        PhaseCost("pair 0", 5_000_000, 20_000_000, 1000, 2, 64, 3e12, 8, weights=2**29, activations=2**26),
        PhaseCost("arm e2e", 5_000_000, 0, 1000, 4, 64, 1.35e13, 8, weights=2**30, activations=2**27),
    ]
    # 150 TFLOP/s are 5.4e17 FLOPs an hour
    totals = {"e2e": 5.4e16, "m2mkd": 5.4e16 * 2.5}
    paths = {"e2e": {"arms/e2e": 5.4e17}, "m2mkd": {"pairs": 2.7e17, "arms/m2mkd": 5.4e17}}
    plan = Plan("tiny", {"all": phases}, totals, paths, gpus=8)
    print_plan(plan, 150.0, "stated", memory=1.5, console=Console(width=200))
    lines = capsys.readouterr().out.splitlines()
    assert any("Plan of tiny on 8 GPUs" in line for line in lines)
    assert any("at 150 TFLOP/s per GPU (stated)" in line for line in lines)
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]] for line in lines if "│" in line
    }
    # 16 steps of 64 images an epoch
    assert rows["pair 0"] == ["5.0 M", "20.0 M", "1,000", "2", "64", "32", "3,000", "6 PFLOPs", "1", "yes"]
    assert rows["arm e2e"][-2:] == ["2", "batch 4"]
    e2e, m2mkd = ([line for line in lines if f"│ {name} " in line] for name in ("e2e", "m2mkd"))
    assert [cell.strip() for cell in e2e[0].split("│")[2:-1]] == ["54 PFLOPs", "0.1", "0.0125", "1.00"]
    assert [cell.strip() for cell in m2mkd[0].split("│")[2:-1]] == ["135 PFLOPs", "0.25", "0.0312", "2.50"]
    assert [cell.strip() for cell in m2mkd[1].split("│")[2:-1]] == ["1.5", "pairs 0.5 → arms/m2mkd 1"]


@pytest.mark.parametrize(
    "flops, said",
    [
        (4.24e11, "424 GFLOPs"),
        (2.69e12, "2.69 TFLOPs"),
        (6e15, "6 PFLOPs"),
        (2.21e19, "22.1 EFLOPs"),
        (3.5e21, "3,500 EFLOPs"),
        (1e7, "0.01 GFLOPs"),
    ],
)
def test_compute_is_in_a_unit_of_its_size(flops: float, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    phase = PhaseCost("arm e2e", 5_000, 0, 1, 1, 1, flops, 1, weights=2**30, activations=1)
    plan = Plan("tiny", {"all": [phase]}, {"e2e": flops}, {"e2e": {"arms/e2e": flops}}, gpus=1)
    print_plan(plan, 1.0, "stated", console=Console(width=200))
    printed = capsys.readouterr().out
    assert printed.count(f" {said} ") == 2
    assert "Fits" not in printed.partition("Fits: or")[0]
    # whatever the device is
    assert "GiB/device" in printed and "GiB/GPU" not in printed
