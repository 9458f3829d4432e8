"""The script for Slurm, run with an `sbatch` that honours arrays and dependencies."""

import math
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import recipe_content, tiny_recipe
from tiny_study import write_study
from typer.testing import CliRunner

from m2mkd.cli import app
from m2mkd.experiment.plan.plan import make_plan
from m2mkd.experiment.recipe import Recipe
from m2mkd.experiment.slurm import slurm_script
from m2mkd.experiment.study.runs import units_and_links
from m2mkd.experiment.study.spec import Point, load_study


# Does the tasks of a job at once, one after the other, and refuses it if a job that it depends on did not succeed.
SBATCH = """#!{python}
import os, re, subprocess, sys
from pathlib import Path
jobs = Path({folder!r})
options = dict(re.fullmatch("--([a-z-]+)=?(.*)", word).groups() for word in sys.argv[1:])
number = str(len(list(jobs.glob("*.options"))) + 1)
(jobs / f"{{number}}.options").write_text(" ".join(sys.argv[1:]))
(jobs / f"{{number}}.sh").write_text(sys.stdin.read())
kind, *needed = options.get("dependency", "afterok").split(":")
assert kind == "afterok" and "parsable" in options and "requeue" in options
first, last = map(int, options["array"].split("-"))
done = all((jobs / f"{{other}}.ok").exists() for other in needed)
for task in range(first, last + 1):
    own = {{**os.environ, "SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": f"{{number}}{{task}}"}}
    with open(jobs / f"{{number}}_{{task}}.out", "w") as out:
        job = ["bash", jobs / f"{{number}}.sh"]
        done = done and not subprocess.run(job, env=own, stdout=out, stderr=out).returncode
if done:
    (jobs / f"{{number}}.ok").touch()
print(f"{{number}};cluster")
"""


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def submit(script: str, folder: Path, m2mkd: str) -> Path:
    """Run a script with the other sbatch and an m2mkd. Returns the folder with the jobs."""
    jobs, commands = folder / "jobs", folder / "bin"
    jobs.mkdir()
    executable(commands / "sbatch", SBATCH.format(python=sys.executable, folder=str(jobs)))
    executable(commands / "m2mkd", f"#!/bin/bash\n{m2mkd}\n")
    path = f"{commands}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash"], input=script, text=True, check=True, env={**os.environ, "PATH": path}, timeout=500)
    return jobs


def script_of(recipe: Recipe, command: str = "run", **options: Any) -> str:
    return slurm_script(recipe.name, [Point("", {}, recipe)], command, **options)


def test_each_phase_is_submitted_once_after_what_it_reads(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, repeat_seeds=[5], equal_compute=True)
    jobs = submit(script_of(recipe, "run 'a recipe.yaml' --seed 0"), tmp_path, f'echo "$@" >> {tmp_path}/log')
    lines = (tmp_path / "log").read_text().splitlines()
    assert all(line.startswith("run a recipe.yaml --seed 0 --phase ") for line in lines)
    names = [line.rpartition(" ")[2] for line in lines]
    arms = ["e2e", "kd", "m2mkd", "e2e_equal_compute", "kd_equal_compute"]
    own = ["pairs/0", "pairs/1", *(f"arms/{arm}" for arm in arms)]
    assert sorted(names) == sorted(["meta", "teacher", *own, *(f"seeds/5/{name}" for name in own)])
    options = [path.read_text() for path in sorted(jobs.glob("*.options"), key=lambda path: int(path.stem))]
    assert all("--gpus=1" in line and re.search(r"--time=\d+ --mem=9G", line) for line in options)
    assert len(list(jobs.glob("*.ok"))) == len(options)
    of = {re.search(r"phases=\((.+)\)", path.read_text())[1]: path.stem for path in jobs.glob("*.sh")}
    for what, after in {
        "pairs/0 pairs/1": ["meta", "teacher"],
        "arms/m2mkd": ["pairs/0 pairs/1"],
        "arms/kd_equal_compute": ["pairs/0 pairs/1", "teacher", "arms/kd"],
    }.items():
        needed = f"--dependency=afterok:{':'.join(of[name] for name in after)}"
        assert needed in (jobs / f"{of[what]}.options").read_text().split()
    assert "--array=0-1" in (jobs / f"{of['pairs/0 pairs/1']}.options").read_text()


def test_what_reads_a_job_that_failed_does_not_run(tmp_path: Path) -> None:
    script = script_of(tiny_recipe(tmp_path), "run r.yaml")
    submit(script, tmp_path, f'echo "$@" >> {tmp_path}/log; [ "${{@: -1}}" != teacher ]')
    names = [line.rpartition(" ")[2] for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(names) == ["arms/e2e", "meta", "teacher"]


def test_pairs_that_the_student_feeds_are_one_job_and_time_grows_with_the_plan(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, distill={"data": "train", "feed": "student"})
    script = script_of(recipe, gpus=4, throughput=1e-9)
    assert "phases=(pairs)" in script and "--gpus=4" in script
    assert "exec accelerate launch --multi_gpu --num_processes 4 -m m2mkd.cli run --phase" in script
    (minutes,) = re.findall(r"--time=(\d+).*\n.*\nphases=\(meta\)", script)
    (meta,) = make_plan(recipe, gpus=4).parts["meta"]
    assert int(minutes) - 30 == math.ceil(2 * meta.flops / (4 * 1e-9 * 1e12) / 60) > 0
    assert "--gpus" not in script_of(recipe, gpus=0)


@pytest.mark.slow
def test_the_script_of_the_command_ends_with_the_report(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_content(tmp_path)))
    script = CliRunner().invoke(app, ["slurm", str(recipe), "--gpus", "0", "--arms", "[e2e, m2mkd]"])
    assert script.exit_code == 0, script.output
    jobs = submit(script.output, tmp_path, f'exec {sys.executable} -m m2mkd.cli "$@"')
    said = "\n".join(path.read_text() for path in jobs.glob("*.out"))
    assert (tmp_path / "run" / "report.json").is_file() and said.count("The report is in") == 1, said
    again = CliRunner().invoke(app, ["slurm", str(recipe), "--gpus", "0", "--arms", "[e2e, m2mkd]"])
    assert "sbatch --parsable" not in again.output


def test_a_study_is_one_script_in_which_what_points_share_is_made_once(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    script = CliRunner().invoke(app, ["slurm", "--study", str(study), "--gpus", "0", "--seeds", "[0]"])
    assert script.exit_code == 0, script.output
    jobs = submit(script.output, tmp_path, f'echo "$@" >> {tmp_path}/log')
    lines = (tmp_path / "log").read_text().splitlines()
    assert all(line.startswith(f"study {study} --seeds [0] --phase ") for line in lines)
    names = [line.rpartition(" ")[2].partition("/") for line in lines]
    kd, modular = ["arms/kd"] * 2, ["arms/after_modules"] * 2
    assert sorted(name for _, _, name in names) == sorted(["meta", "teacher", "pairs/0", "pairs/1", *kd, *modular])
    _, points = load_study(study, {"seeds": [0]})
    assert {point for point, _, _ in names} == {points[unit.point].name for unit in units_and_links(points)[0]}
    # of four arms, those that read the same are one array
    arms = [path for path in jobs.glob("*.sh") if "/arms/" in path.read_text()]
    assert len(arms) == 2 and all("--array=0-1" in path.with_suffix(".options").read_text() for path in arms)


@pytest.mark.slow
def test_the_script_of_a_study_ends_with_its_report(tmp_path: Path) -> None:
    arguments = ["slurm", "--study", str(write_study(tmp_path)), "--gpus", "0", "--seeds", "[0]"]
    script = CliRunner().invoke(app, arguments)
    jobs = submit(script.output, tmp_path, f'exec {sys.executable} -m m2mkd.cli "$@"')
    said = "\n".join(path.read_text() for path in jobs.glob("*.out"))
    assert (tmp_path / "study" / "study.json").is_file() and said.count("The study is in") == 1, said
    assert "sbatch --parsable" not in CliRunner().invoke(app, arguments).output
