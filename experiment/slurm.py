"""A run as Slurm jobs: a script that submits them, each after those whose artifacts it reads."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from m2mkd.experiment.phases import Phase
from m2mkd.experiment.plan.costs import PhaseCost
from m2mkd.experiment.plan.plan import make_plan
from m2mkd.experiment.recipe import Recipe
from m2mkd.experiment.run_data import RunData
from m2mkd.experiment.runner import all_phases, read_by
from m2mkd.screen import Screen


# Evaluation, data and start are not in the plan.
_TIMES_THE_PLAN, _MINUTES_MORE = 2, 30
# Python, torch and the images in the host's memory.
_GIB_MORE = 8
_SCRIPT = """#!/bin/bash
# Submits the phases of {name} as Slurm jobs. Start it in the folder that its paths are relative to; all nodes see it.
# Partition and account: SBATCH_PARTITION=gpu SBATCH_ACCOUNT=me bash THIS_FILE. Device memory: GiB/device of --plan.
set -euo pipefail
"""
_JOB = """
# {what}
{variable}=$(sbatch {options} <<'EOF'
#!/bin/bash
phases=({phases})
exec {command} --phase "${{phases[$SLURM_ARRAY_TASK_ID]}}"
EOF
)
"""


@dataclass(frozen=True)
class _Job:
    """A job array: the costs of phases of one kind, by name, and the jobs that all of them read."""

    variable: str
    tasks: dict[str, list[PhaseCost]]
    after: tuple[str, ...]


def slurm_script(recipe: Recipe, arguments: Sequence[str], gpus: int = 1, throughput: float = 100.0) -> str:
    """
    Write the script that submits the unfinished phases of a recipe.

    Args:
        recipe (`Recipe`)
        arguments (`Sequence[str]`): What `m2mkd run` gets: the recipe's file and overrides.
        gpus (`int`, *optional*, defaults to 1): GPUs of each job; 0: none.
        throughput (`float`, *optional*, defaults to 100.0): TFLOP/s of one device, from which the time limits follow:
            twice the plan and half an hour.

    Raises:
        `RecipeError`, `StageError` or `DataError`: as in `make_plan`.
    """
    launcher = f"accelerate launch --multi_gpu --num_processes {gpus} -m m2mkd.cli" if gpus > 1 else "m2mkd"
    command = f"{launcher} run {shlex.join(arguments)}".rstrip()
    script = _SCRIPT.format(name=recipe.name)
    for job in _jobs(recipe, max(gpus, 1)):
        script += _JOB.format(
            what=", ".join(job.tasks),
            variable=job.variable,
            options=" ".join(_options(recipe, job, gpus, throughput)),
            phases=shlex.join(job.tasks),
            command=command,
        )
    return script


def _jobs(recipe: Recipe, devices: int) -> list[_Job]:
    phases = all_phases(recipe, RunData(recipe), Screen())
    costs = make_plan(recipe, devices).parts
    jobs: dict[tuple[str, int, tuple[str, ...]], _Job] = {}
    job_of: dict[str, str] = {}
    for phase in phases:
        tasks = _tasks(phase, costs[phase.name])
        if tasks:
            read = [other.title for other in read_by(phase, phases)]
            after = tuple(dict.fromkeys(job_of[title] for title in read if title in job_of))
            key = (phase.name.partition("/")[0], phase.session.seed, after)
            job = jobs.setdefault(key, _Job(f"{key[0]}_{len(jobs)}", {}, after))
            job.tasks.update(tasks)
            job_of[phase.title] = job.variable
    return list(jobs.values())


def _tasks(phase: Phase, costs: list[PhaseCost]) -> dict[str, list[PhaseCost]]:
    """The unfinished parts of a phase, as small as can run on their own, by name."""
    parts = {name: own for name, own in phase.by_name().items() if not own.is_finished()}
    alone = {name: own for name, own in parts.items() if own is not phase} or parts
    return {name: own.costs_of_own(costs) for name, own in alone.items()}


def _options(recipe: Recipe, job: _Job, gpus: int, throughput: float) -> list[str]:
    devices = max(gpus, 1)
    flops = max(sum(cost.flops for cost in own) for own in job.tasks.values())
    minutes = math.ceil(_TIMES_THE_PLAN * flops / (throughput * 1e12 * devices) / 60) + _MINUTES_MORE
    memory = max((cost.memory for own in job.tasks.values() for cost in own), default=0) * devices
    return [
        "--parsable --requeue",
        f"--job-name={shlex.quote(f'{recipe.name} {job.variable}')}",
        f"--array=0-{len(job.tasks) - 1}",
        f"--time={minutes}",
        f"--mem={math.ceil(memory / 2**30) + _GIB_MORE}G",
        *([f"--gpus={gpus}"] if gpus else []),
        *([f"--kill-on-invalid-dep=yes --dependency=afterok:{_ids(job.after)}"] if job.after else []),
    ]


def _ids(jobs: Sequence[str]) -> str:
    # of a federation, sbatch prints `id;cluster`
    return ":".join(f"${{{name}%%;*}}" for name in jobs)
