"""Engines: what does the phases of a run, where."""

from collections.abc import Sequence

from m2mkd.errors import RunError
from m2mkd.experiment.engines import local
from m2mkd.experiment.engines.task import Task, Work
from m2mkd.experiment.recipe import Recipe


def run_tasks(recipe: Recipe, tasks: Sequence[Task], work: Work, processes: int) -> None:
    """
    Do all tasks with the recipe's engine.

    Args:
        recipe (`Recipe`)
        tasks (`Sequence[Task]`)
        work (`Callable`): Called as `work(screen, *task.arguments)`, or `work(screen, *task.arguments, part)`.
        processes (`int`): Number of tasks to do at once on this machine; with Ray, what is free decides.

    Raises:
        `RunError`: Ray is asked for and not installed, or as in the engine. An error in a task is raised here as well.
    """
    if recipe.engine == "local":
        local.run_tasks(tasks, work, processes)
        return
    try:
        from m2mkd.experiment.engines import ray
    except ModuleNotFoundError as error:
        raise RunError("`engine` is ray, but Ray is not installed: pip install 'm2mkd[ray]', on all nodes.") from error
    ray.run_tasks(tasks, work, recipe.output_dir)
