"""Running a study: everything is made once, and a stopped study goes on."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from tiny_study import write_study

from m2mkd.errors import RunError
from m2mkd.experiment.artifact import TRAIN_RESULTS
from m2mkd.experiment.one_writer import Writer
from m2mkd.experiment.run_folder import lock_file
from m2mkd.experiment.study.report import report_study
from m2mkd.experiment.study.results import collect_study
from m2mkd.experiment.study.runs import run_study, units_and_links
from m2mkd.experiment.study.spec import load_study
from m2mkd.files import write_json


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A study that was run to its end."""
    folder = tmp_path_factory.mktemp("study")
    spec, points = load_study(write_study(folder))
    run_study(points, processes=1)
    report_study(spec, points)
    return folder


def real_folders(folder: Path) -> list[str]:
    """The artifacts that were made, and not linked."""
    found = [path.parent for path in folder.rglob(TRAIN_RESULTS)]
    runs = folder / "study" / "runs"
    return sorted(
        str(path.relative_to(runs)) for path in found if not any(p.is_symlink() for p in [path, *path.parents])
    )


def test_shared_artifacts_are_made_once(finished: Path) -> None:
    kinds = [Path(name).parts[-1] if "arms" not in name else "arm" for name in real_folders(finished)]
    # meta model and teacher once, two pairs per seed, four arms per seed
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"meta": 1, "teacher": 1, "0": 2, "1": 2, "arm": 8}
    links = [path for path in (finished / "study").rglob("*") if path.is_symlink()]
    assert links and not any(os.path.isabs(os.readlink(path)) for path in links)


def test_the_report_has_every_point_and_seed(finished: Path) -> None:
    study = json.loads((finished / "study" / "study.json").read_text())
    assert study["seeds"] == [0, 1] and study["baseline"] == "kd"
    assert {name: len(curve["points"]) for name, curve in study["curves"].items()} == {"kd": 2, "after_modules": 2}
    for curve in study["curves"].values():
        for point in curve["points"]:
            assert point["seeds"].keys() == {"0", "1"}
            for own in point["seeds"].values():
                assert 0 <= own["iid"] <= 1 and own["train_flops"] > 0 and own["peak_memory"] > 0
    compared = study["comparisons"]
    assert compared and all(entry["curve"] == "after_modules" for entry in compared)
    text = (finished / "study" / "study.md").read_text()
    assert "after_modules − kd at" in text and "2 seeds: " in text
    assert (finished / "study" / "study.png").stat().st_size > 10_000


def test_modules_are_counted_in_the_compute_and_teacher_is_extra(finished: Path) -> None:
    study = json.loads((finished / "study" / "study.json").read_text())
    teacher = study["teacher"]["train_flops"]
    modules = study["curves"]["after_modules"]["points"][0]
    kd = study["curves"]["kd"]["points"][0]
    assert modules["extra_flops"] == kd["extra_flops"] == teacher
    # one epoch of distillation and one of kd, against one of kd
    assert modules["seeds"]["0"]["train_flops"] > 1.5 * kd["seeds"]["0"]["train_flops"]


def test_a_second_start_runs_nothing_and_a_lost_artifact_is_made_again(finished: Path, capsys) -> None:
    spec, points = load_study(finished / "study.yaml")
    before = real_folders(finished)
    run_study(points, processes=1)
    assert "12 phases, of which 12 are finished" in capsys.readouterr().out
    lost = Path(points[0].recipe.output_dir) / "arms" / "kd"
    results = json.loads((lost / TRAIN_RESULTS).read_text())
    shutil.rmtree(lost)
    with pytest.raises(RunError, match="Seed 0 is not finished for all points"):
        collect_study(spec, points)
    run_study(points, processes=1)
    again = json.loads((lost / TRAIN_RESULTS).read_text())
    assert again["log_history"] == results["log_history"]
    assert real_folders(finished) == before


def test_seeds_that_are_not_finished_are_left_out_of_the_report(finished: Path) -> None:
    spec, points = load_study(finished / "study.yaml", {"seeds": [0, 1, 2]})
    assert collect_study(spec, points)["seeds"] == [0, 1]


def test_phases_that_others_wait_for_come_first_and_seeds_one_after_the_other(finished: Path) -> None:
    _, points = load_study(finished / "study.yaml")
    units, links = units_and_links(points)
    names = [(unit.phase.session.seed, unit.phase.name) for unit in units]
    assert [name for _, name in names[:2]] == ["meta", "teacher"]
    assert [seed for seed, _ in names] == sorted(seed for seed, _ in names)
    assert len(units) == 12
    assert all(link.source != link.target for link in links)


@pytest.mark.slow
def test_processes_side_by_side_make_the_same_accuracies(finished: Path, tmp_path: Path) -> None:
    spec, points = load_study(finished / "study.yaml", {"output_dir": str(tmp_path / "again"), "seeds": [0]})
    run_study(points, processes=2)
    ours, theirs = collect_study(spec, points), json.loads((finished / "study" / "study.json").read_text())
    for name, curve in ours["curves"].items():
        for own, other in zip(curve["points"], theirs["curves"][name]["points"], strict=True):
            assert own["seeds"]["0"]["iid"] == other["seeds"]["0"]["iid"]


def test_a_study_stops_beside_another_process_that_makes_one_of_its_artifacts(tmp_path: Path) -> None:
    _, points = load_study(write_study(tmp_path))
    arm = Path(points[-1].recipe.output_dir) / "arms" / points[-1].curve
    arm.parent.mkdir(parents=True)
    write_json(lock_file(arm), {**asdict(Writer.here()), "host": "node7"})
    with pytest.raises(RunError, match=f"{arm} is being made by process .* on node7"):
        run_study(points)
    assert len(list(tmp_path.rglob("*.lock"))) == 1
