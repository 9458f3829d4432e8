"""The time that phases are expected to take: arithmetic, and one measured step."""

from pathlib import Path

import pytest
from tiny_run import recipe_content

from m2mkd.experiment.engines.task import Task
from m2mkd.experiment.phases import phases_of
from m2mkd.experiment.plan import expected
from m2mkd.experiment.plan.expected import expect, print_expected, wall_clock
from m2mkd.experiment.recipe_file import parse_recipe
from m2mkd.experiment.run_data import RunData
from m2mkd.experiment.session import Session
from m2mkd.screen import Screen


TASKS = [
    Task("teacher", ()),
    Task("e2e", ()),
    Task("pairs", (), ("teacher",)),
    Task("m2mkd", (), ("pairs", "finished before")),
]
SECONDS = {"teacher": 10.0, "e2e": 25.0, "pairs": 5.0, "m2mkd": 20.0}


@pytest.mark.parametrize("processes, seconds", [(1, 60.0), (2, 35.0), (8, 35.0)])
def test_tasks_wait_for_a_process_and_for_what_they_read(processes: int, seconds: float) -> None:
    assert wall_clock(TASKS, SECONDS, processes) == seconds
    assert wall_clock([], {}, processes) == 0


def test_every_phase_gets_the_time_of_its_flops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(expected, "MEASURED_SECONDS", 0.0)
    recipe = parse_recipe(recipe_content(tmp_path), "a test")
    phases = list(phases_of(Session(recipe, RunData(recipe), recipe.seed, Screen())).values())
    found = expect(phases, processes=1)
    assert list(found) == [phase.title for phase in phases]
    pace = {
        name: sum(cost.flops for cost in found[f"[seed {recipe.seed}] {name}"].costs) / own
        for name in ("teacher", "arm e2e", "arm m2mkd", "pairs")
        if (own := found[f"[seed {recipe.seed}] {name}"].seconds)
    }
    # the student's pace for all phases that train it
    assert pace["arm e2e"] == pytest.approx(pace["arm m2mkd"]) == pytest.approx(pace["pairs"]) != pace["teacher"]
    print_expected(found, 100.0, processes=2)
    printed = capsys.readouterr().out
    assert "To run: about 2 min" in printed and all(phase.title in printed for phase in phases)
    assert not list(tmp_path.rglob("checkpoint-*"))
