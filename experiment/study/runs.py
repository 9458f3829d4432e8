"""Runs all points of a study; phases with the same fingerprint are run once, and their artifacts are linked."""

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from m2mkd.data.labeled_images import LabeledImages
from m2mkd.errors import RecipeError
from m2mkd.experiment.check import check_arguments
from m2mkd.experiment.claim import claim_folder
from m2mkd.experiment.engines import run_tasks
from m2mkd.experiment.engines.task import Task
from m2mkd.experiment.fingerprint import fingerprint
from m2mkd.experiment.machine import num_processes, use_all_cores
from m2mkd.experiment.one_writer import one_writer
from m2mkd.experiment.phases import Phase, phases_of
from m2mkd.experiment.recipe import Recipe
from m2mkd.experiment.recipe_networks import RecipeNetworks
from m2mkd.experiment.run_data import RunData
from m2mkd.experiment.runner import quieten, run
from m2mkd.experiment.session import Session
from m2mkd.experiment.study.spec import Point
from m2mkd.screen import Screen


@dataclass(frozen=True)
class Unit:
    """
    A phase of a point that is run for all points that need its artifact.

    Args:
        title (`str`): Unique in the study.
        point (`int`): Index of the point whose folder has the artifact itself.
        phase (`Phase`)
        reads (`tuple[str, ...]`): Titles of the units whose artifacts it reads.
    """

    title: str
    point: int
    phase: Phase
    reads: tuple[str, ...]


@dataclass(frozen=True)
class Link:
    """An artifact in one point's folder (`target`) that is the one of another's (`source`)."""

    source: Path
    target: Path


def units_and_links(points: Sequence[Point]) -> tuple[list[Unit], list[Link]]:
    """
    Find the phases to run, seed by seed, and the artifacts to link.

    Args:
        points (`Sequence[Point]`)
    """
    units: dict[str, Unit] = {}
    links: list[Link] = []
    for index, point in enumerate(points):
        data = RunData(point.recipe)
        for seed in [point.recipe.seed, *point.recipe.repeat_seeds]:
            phases = phases_of(Session(point.recipe, data, seed, Screen()))
            prints = {name: fingerprint(phase, phases) for name, phase in phases.items()}
            for name, phase in phases.items():
                reads = tuple(prints[other] for other in phase.reads if other in phases)
                unit = units.setdefault(prints[name], Unit(prints[name], index, phase, reads))
                if unit.point != index:
                    pairs = zip(unit.phase.artifacts, phase.artifacts, strict=True)
                    links += [Link(source, target) for source, target in pairs]
    seeds = {seed: place for place, seed in enumerate([points[0].recipe.seed, *points[0].recipe.repeat_seeds])}
    ordered = sorted(
        units.values(), key=lambda unit: (not unit.phase.is_shared, seeds[unit.phase.session.seed], unit.phase.rank)
    )
    return ordered, links


def run_study(points: Sequence[Point], processes: int | None = None, take_over: bool = False) -> None:
    """
    Run every phase of a study that is not finished.

    Args:
        points (`Sequence[Point]`)
        processes (`int`, *optional*): Phases at once. `None`: as a run of one of the recipes with all seeds.
        take_over (`bool`, *optional*, defaults to `False`): See `one_writer`.

    Raises:
        `RunError`: a folder has a run of another recipe or cannot be written, or another process makes an artifact.
    """
    quieten()
    use_all_cores()
    units, links = units_and_links(points)
    with one_writer([path for unit in units for path in unit.phase.to_make()], take_over):
        _run_units(points, units, links, processes)


def run_phase(points: Sequence[Point], name: str, take_over: bool = False) -> bool:
    """
    Run one phase of a study.

    Args:
        points (`Sequence[Point]`)
        name (`str`): Name of the point, and of the artifact in its folder: `"kd-1f2e3d4c/arms/kd"`.
        take_over (`bool`, *optional*, defaults to `False`): See `one_writer`.

    Returns:
        Whether all phases of the study are finished now.

    Raises:
        `RecipeError`: the study has no such phase.
        `RunError`: as in `run`.
    """
    units, links = units_and_links(points)
    names = [f"{points[unit.point].name}/{part}" for unit in units for part in unit.phase.by_name()]
    if name not in names:
        raise RecipeError(f"--phase is {name!r}, but the study has only {', '.join(names)}")
    own, _, phase = name.partition("/")
    link_finished(links)
    run(next(point.recipe for point in points if point.name == own), phase, take_over)
    link_finished(links)
    return all(unit.phase.is_finished() for unit in units)


def _run_units(points: Sequence[Point], units: Sequence[Unit], links: Sequence[Link], processes: int | None) -> None:
    screen = Screen()
    for point in points:
        session = Session(point.recipe, _data_of(point.recipe), point.recipe.seed, screen)
        RecipeNetworks(point.recipe, session.data.class_names)
        check_arguments(phases_of(session).values())
        claim_folder(point.recipe)
    link_finished(links)
    missing = [unit for unit in units if not unit.phase.is_finished()]
    screen.say(f"{len(points)} points, {len(units)} phases, of which {len(units) - len(missing)} are finished")
    names = {unit.title: f"{points[unit.point].name} {unit.phase.title}" for unit in missing}
    tasks = [
        Task(
            names[unit.title],
            (unit.point, unit.phase.session.seed, unit.phase.name),
            tuple(names[title] for title in unit.reads if title in names),
            unit.phase.parts(),
            unit.phase.resources(),
        )
        for unit in missing
    ]
    work = partial(_work, [point.recipe for point in points], links)
    recipe = points[0].recipe
    run_tasks(recipe, tasks, work, processes or num_processes(recipe))
    link_finished(links)


def link_finished(links: Iterable[Link]) -> None:
    """Link the artifacts that exist, each with a path relative to the folder of the link."""
    for link in links:
        if link.source.exists() and not link.target.exists():
            link.target.parent.mkdir(parents=True, exist_ok=True)
            # another process may be faster
            with suppress(FileExistsError):
                link.target.symlink_to(os.path.relpath(link.source, link.target.parent), target_is_directory=True)


def _work(
    recipes: Sequence[Recipe],
    links: Sequence[Link],
    screen: Screen,
    point: int,
    seed: int,
    name: str,
    part: str | None = None,
) -> None:
    """Run one phase of a point or a part of it, in this process or in a worker."""
    quieten()
    link_finished(links)
    recipe = recipes[point]
    phase = phases_of(Session(recipe, _data_of(recipe), seed, screen))[name]
    (phase if part is None else phase.by_name()[part]).run()


def _data_of(recipe: Recipe) -> RunData:
    """The images of a recipe; those of recipes with the same data sets are loaded once in a process."""
    return RunData(recipe, _loaded(recipe.model_dump_json(include={"data"})))


@lru_cache
def _loaded(data: str) -> dict[str, LabeledImages]:
    return {}
