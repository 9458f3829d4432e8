"""Reading of report.json."""

from pathlib import Path
from typing import Any

from m2mkd.errors import HubError
from m2mkd.experiment.arms import arm_of_folder
from m2mkd.experiment.artifact import check_is_run
from m2mkd.files import read_json
from m2mkd.model_cards.parts import REPORT_FILE


def read_report(run_folder: Path) -> dict[str, Any]:
    """
    Read `report.json` of a run. Raises `HubError` if it is missing or damaged, and `RunError` if the folder is not a
    run.
    """
    path = run_folder / REPORT_FILE
    if not path.is_file():
        check_is_run(run_folder)
    way_out = f"Finish the run, or write the report again with `m2mkd report {run_folder}`."
    report = read_json(path, HubError, way_out)
    for own in (report, *report["seeds"].values()):
        for name, result in own["arms"].items():
            if "text" not in (result.get("arm") or {}):
                # reports of earlier versions name presets only
                arm = arm_of_folder(name, result.get("arm"))
                result["arm"] = None if arm is None else arm.described()
    return report


def default_arm(run_folder: Path) -> str:
    """The arm of a run that is pushed if none is named, see [`main_arm`]."""
    return main_arm(read_report(run_folder))


def main_arm(report: dict[str, Any]) -> str:
    """The arm of a report that starts from modules, the first of them; if none does, the first arm."""
    modular = [name for name, result in report["arms"].items() if result["arm"]["init"] == "modules"]
    return next(iter([*modular, *report["arms"]]))


def result_of(report: dict[str, Any], run_folder: Path, arm: str, seed: int) -> dict[str, Any]:
    """The results of one arm in a report. Raises `HubError` if it has no such seed or arm."""
    seeds = report["seeds"]
    if str(seed) not in seeds:
        raise HubError(f"{run_folder / REPORT_FILE} has no seed {seed}, only {', '.join(seeds)}.")
    arms = seeds[str(seed)]["arms"]
    if arm not in arms:
        raise HubError(f"{run_folder / REPORT_FILE} has no arm {arm!r}, only {', '.join(arms)}.")
    return arms[arm]
