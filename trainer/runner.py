"""Runs a recipe: each phase once, into a folder of its own; what is finished is skipped."""

import os
from functools import partial
from pathlib import Path

import torch
import transformers
from accelerate import PartialState

from m2mkd.trainer.cards import write_cards
from m2mkd.trainer.folders import RunError
from m2mkd.trainer.phases import BEFORE_ARMS, Phases
from m2mkd.trainer.recipe import Recipe
from m2mkd.trainer.report import collect, print_report, read_histories, write_report
from m2mkd.trainer.report_graph import density, draw_graphs, read_graphs
from m2mkd.trainer.run_data import RunData
from m2mkd.trainer.run_folder import claim_folder
from m2mkd.trainer.schedule import Task, run_tasks
from m2mkd.trainer.screen import Screen


# In which order phases start that could start at once: what others wait for, then the longest arms.
_ORDER = (*BEFORE_ARMS, "e2e_equal_compute", "kd_equal_compute", "kd", "e2e", "m2mkd")


def run(recipe: Recipe) -> Path | None:
    """
    Run what a recipe asks for and is not finished yet.

    Args:
        recipe (`Recipe`)

    Returns:
        Path of the report (`report.md`); `None` if pairs that other processes train are still missing.

    Raises:
        `RunError`: the folder holds a run of another recipe, or cannot be written.
    """
    _quieten()
    _use_all_cores()
    processes = _num_processes(recipe)
    data, screen = RunData(recipe), Screen()
    data.check()
    for line in data.describe():
        screen.say(line)
    runs = [Phases(recipe, data, seed, screen) for seed in [recipe.seed, *recipe.repeat_seeds]]
    runs[0].check()
    claim_folder(Path(recipe.output_dir), recipe)
    tasks = [task for run in runs for task in run.tasks()]
    # what others wait for first, then the longest arms; seed by seed among equals
    tasks.sort(key=lambda task: _ORDER.index(_phase(task)))
    work = partial(_work, recipe, data)
    if any(run.pairs_elsewhere() for run in runs):
        run_tasks([task for task in tasks if _phase(task) in BEFORE_ARMS], work, processes)
        for run in runs:
            run.say_which_pairs_are_missing()
        if any(run.missing_pairs() for run in runs):
            return None
        tasks = [task for task in tasks if _phase(task) not in BEFORE_ARMS]
    run_tasks(tasks, work, processes)
    return make_report(recipe)


def _phase(task: Task) -> str:
    _, phase = task.arguments
    return phase


def _work(recipe: Recipe, data: RunData, screen: Screen, seed: int, phase: str) -> None:
    """Run one phase, in this process or in a worker."""
    _quieten()
    Phases(recipe, data, seed, screen).do(phase)


def _quieten() -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _num_processes(recipe: Recipe) -> int:
    """How many phases run at once."""
    alone = PartialState().num_processes == 1
    if recipe.processes is not None:
        if recipe.processes > 1 and not alone:
            raise RunError(
                f"`processes` is {recipe.processes}, but {PartialState().num_processes} processes already share each "
                "phase. Leave `processes` out, or start one process."
            )
        return recipe.processes
    if not alone or torch.accelerator.is_available():
        return 1
    # small networks gain nothing from a second thread, and all from a second process
    return min(torch.get_num_threads(), len(recipe.arms) * (1 + len(recipe.repeat_seeds)))


def _use_all_cores() -> None:
    """`accelerate launch` gives a process one thread unless told otherwise; alone on a CPU it may have them all."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if launched and PartialState().num_processes == 1 and not torch.accelerator.is_available():
        torch.set_num_threads(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )


def make_report(recipe: Recipe) -> Path:
    """
    Write `report.json`, `report.md` and `report.png` from the folders of a finished run, and the model card of each
    arm into its folder. Returns the path of `report.md`.
    """
    _quieten()
    output_dir = Path(recipe.output_dir)
    if PartialState().is_main_process:
        device = _device(recipe)
        report = collect(output_dir, recipe.model_dump(mode="json"), recipe.seed, recipe.repeat_seeds, device)
        graph = None
        if recipe.student.model.model_type == "nac":
            arms = {arm: output_dir / "arms" / arm for arm in report["arms"]}
            affinities = read_graphs(arms, recipe.student.depths, recipe.seed)
            report["graph_density"] = {name: density(affinity) for name, affinity in affinities.items()}
            graph = draw_graphs(affinities)
        write_report(output_dir, report, read_histories(output_dir, recipe.seed, recipe.repeat_seeds), graph)
        write_cards(output_dir)
        print_report(report)
    PartialState().wait_for_everyone()
    return output_dir / "report.md"


def _device(recipe: Recipe) -> str:
    """In words, what the run was made on."""
    processes = _num_processes(recipe)
    aside = f", up to {processes} phases side by side" if processes > 1 else ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"{device}{aside}"
