"""The plan on the command line."""

import math
import os

from rich.console import Console

from m2mkd.errors import RecipeError
from m2mkd.experiment.check import check_arguments
from m2mkd.experiment.phases import phases_of
from m2mkd.experiment.plan.plan import make_plan
from m2mkd.experiment.plan.table import print_plan
from m2mkd.experiment.plan.throughput import THROUGHPUT, measure_throughput
from m2mkd.experiment.recipe import Recipe
from m2mkd.experiment.run_data import RunData
from m2mkd.experiment.session import Session
from m2mkd.screen import Screen


def print_plan_of(recipe: Recipe, throughput: str, gpus: int | None, memory: float | None) -> None:
    """
    Print the plan of a recipe: what `m2mkd run --plan` does.

    Args:
        recipe (`Recipe`)
        throughput (`str`): TFLOP/s of one GPU, `"measured"`, or empty for the assumed one.
        gpus (`int`, *optional*): Defaults to the number of processes.
        memory (`float`, *optional*): GiB of one GPU.

    Raises:
        `RecipeError`: the throughput is not a positive number, or as [`make_plan`].
    """
    # in every process: they meet while the arguments are built
    check_arguments(phases_of(Session(recipe, RunData(recipe), recipe.seed, Screen())).values())
    if int(os.environ.get("RANK", "0")) != 0:
        return
    try:
        measured = throughput == "measured"
        value = measure_throughput() if measured else float(throughput or THROUGHPUT)
        if not 0 < value < math.inf:
            raise ValueError
    except ValueError as error:
        raise RecipeError(
            f"--throughput is {throughput!r}; give a positive number of TFLOP/s, or 'measured'."
        ) from error
    how = "measured on this machine" if measured else "stated" if throughput else "assumed; see --throughput"
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    with Console(stderr=True).status("Counting a step of each phase"):
        plan = make_plan(recipe, gpus or processes)
    print_plan(plan, value, how, memory)
