"""A run or a study as Slurm jobs: a script that submits them, each after those whose artifacts it reads."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter

from m2mkd.experiment.plan.costs import PhaseCost
from m2mkd.experiment.plan.plan import make_plan
from m2mkd.experiment.study.runs import units_and_links
from m2mkd.experiment.study.spec import Point


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


def slurm_script(
    name: str, points: Sequence[Point], command: str, gpus: int = 1, throughput: float = 100.0, is_study: bool = False
) -> str:
    """
    Write the script that submits the unfinished phases of a run or a study.

    Args:
        name (`str`): Name of the run or study.
        points (`Sequence[Point]`): The points of the study, or the one recipe of the run.
        command (`str`): What runs it after `m2mkd`, to which `--phase NAME` is added: `run RECIPE` or `study STUDY`.
        gpus (`int`, *optional*, defaults to 1): GPUs of each job; 0: none.
        throughput (`float`, *optional*, defaults to 100.0): TFLOP/s of one device, from which the time limits follow:
            twice the plan and half an hour.
        is_study (`bool`, *optional*, defaults to `False`): Whether names of phases start with that of the point.

    Raises:
        `RecipeError`, `StageError` or `DataError`: as in `make_plan`.
    """
    launcher = f"accelerate launch --multi_gpu --num_processes {gpus} -m m2mkd.cli" if gpus > 1 else "m2mkd"
    script = _SCRIPT.format(name=name)
    for job in _jobs(points, max(gpus, 1), is_study):
        script += _JOB.format(
            what=", ".join(job.tasks),
            variable=job.variable,
            options=" ".join(_options(name, job, gpus, throughput)),
            phases=shlex.join(job.tasks),
            command=f"{launcher} {command}",
        )
    return script


def _jobs(points: Sequence[Point], devices: int, is_study: bool) -> list[_Job]:
    jobs: dict[tuple[str, int, tuple[str, ...]], _Job] = {}
    job_of: dict[str, str] = {}
    units = {unit.title: unit for unit in units_and_links(points)[0] if not unit.phase.is_finished()}
    plans = {index: make_plan(points[index].recipe, devices).parts for index in {own.point for own in units.values()}}
    for title in TopologicalSorter({title: units.keys() & unit.reads for title, unit in units.items()}).static_order():
        unit = units[title]
        phase, prefix = unit.phase, f"{points[unit.point].name}/" if is_study else ""
        kind, parts, costs = phase.name.partition("/")[0], phase.by_name(), plans[unit.point][phase.name]
        after = tuple(dict.fromkeys(job_of[read] for read in unit.reads if read in job_of))
        # what reads parts waits for those of its own phase only
        key = (title if len(phase.parts()) > 1 else kind, phase.session.seed, after)
        job = jobs.setdefault(key, _Job(f"{kind}_{len(jobs)}", {}, after))
        job.tasks.update({f"{prefix}{part}": parts[part].costs_of_own(costs) for part in phase.parts()})
        job_of[title] = job.variable
    return list(jobs.values())


def _options(name: str, job: _Job, gpus: int, throughput: float) -> list[str]:
    devices = max(gpus, 1)
    flops = max(sum(cost.flops for cost in own) for own in job.tasks.values())
    minutes = math.ceil(_TIMES_THE_PLAN * flops / (throughput * 1e12 * devices) / 60) + _MINUTES_MORE
    memory = max((cost.memory for own in job.tasks.values() for cost in own), default=0) * devices
    return [
        "--parsable --requeue",
        f"--job-name={shlex.quote(f'{name} {job.variable}')}",
        f"--array=0-{len(job.tasks) - 1}",
        f"--time={minutes}",
        f"--mem={math.ceil(memory / 2**30) + _GIB_MORE}G",
        *([f"--gpus={gpus}"] if gpus else []),
        *([f"--kill-on-invalid-dep=yes --dependency=afterok:{_ids(job.after)}"] if job.after else []),
    ]


def _ids(jobs: Sequence[str]) -> str:
    # of a federation, sbatch prints `id;cluster`
    return ":".join(f"${{{name}%%;*}}" for name in jobs)
