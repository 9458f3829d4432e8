"""Cost of a recipe: parameters, FLOPs, memory and steps of every phase, without data, GPUs or training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from m2mkd.experiment.arms import Arm
from m2mkd.experiment.phases import Phase, phases_of
from m2mkd.experiment.plan.costs import Costs, PhaseCost
from m2mkd.experiment.recipe import Recipe
from m2mkd.experiment.session import Session
from m2mkd.screen import Screen


_IN_WORDS = {"meta": "meta model", "teacher": "teacher"}


@dataclass(frozen=True)
class Plan:
    """
    A recipe's phases in the order in which they run, and the totals of each arm.

    Args:
        name (`str`): Name of the recipe.
        parts (`dict[str, list[PhaseCost]]`): Costs by name of the phase. Those of `pairs` are `pair 0`, `pair 1`, …,
            single pairs, each in its own process, and `pairs`, all pairs together.
        totals (`dict[str, float]`): FLOPs by arm, with and without the networks that the arm needs beforehand.
        paths (`dict[str, dict[str, float]]`): By arm, all phases that it needs in their order, with the FLOPs of the
            busiest device: the pairs run side by side, and the devices share everything else.
        gpus (`int`): Number of GPUs that steps, memory and paths refer to.
        data (`list[str]`): One line per data set: its images and classes.
    """

    name: str
    parts: dict[str, list[PhaseCost]]
    totals: dict[str, float]
    paths: dict[str, dict[str, float]]
    gpus: int
    data: list[str] = field(default_factory=list)

    @property
    def phases(self) -> list[PhaseCost]:
        """All parts in order."""
        return [part for own in self.parts.values() for part in own]


def make_plan(recipe: Recipe, gpus: int = 1) -> Plan:
    """
    Plan a recipe. Its networks are built on the meta device, without memory for their weights.

    Args:
        recipe (`Recipe`)
        gpus (`int`, *optional*, defaults to 1): Devices that share each phase.

    Raises:
        `RecipeError` or `StageError`: the networks do not fit the recipe's depths or each other.
        `DataError`: the images of a set must be counted, but they are not on this machine.
    """
    costs = Costs(recipe, gpus)
    phases = phases_of(Session(recipe, costs.data, recipe.seed, Screen()))
    parts = {name: phase.cost(costs) for name, phase in phases.items()}
    flops = {name: phases[name].flops_of(own) for name, own in parts.items()}
    arms = recipe.all_arms
    caches = {arm.name: sum(flops[f"cache/{name}"] for name in recipe.caches_of(arm)) for arm in arms.values()}
    totals = {arm.name: _total(arm, flops) + caches[arm.name] for arm in arms.values() if arm.budget is None}
    for arm in arms.values():
        if arm.budget is not None:
            (part,) = parts[f"arms/{arm.name}"]
            parts[f"arms/{arm.name}"] = [part.with_flops(totals[arm.budget] - caches[arm.name])]
    for arm in arms.values():
        beforehand = sum(flops[name] for name in _beforehand(f"arms/{arm.name}", phases) if name in _IN_WORDS)
        if arm.name in totals and beforehand:
            what = " and ".join(_IN_WORDS[name] for name in arm.extra)
            totals[f"{arm.name}, {what} included"] = totals[arm.name] + beforehand
    busiest = {name: _busiest(phases[name].side_by_side(own), gpus) for name, own in parts.items()}
    paths = {arm.name: _path(f"arms/{arm.name}", phases, busiest) for arm in arms.values()}
    return Plan(recipe.name, parts, totals, paths, gpus, costs.sets)


def _path(name: str, phases: Mapping[str, Phase], busiest: Mapping[str, float]) -> dict[str, float]:
    needed = _beforehand(name, phases) | {name}
    return {other: flops for other, flops in busiest.items() if other in needed}


def _busiest(parts: Sequence[float], devices: int) -> float:
    """FLOPs of the busiest device, if each part gets the same number of devices and the longest starts first."""
    each = max(devices // len(parts), 1)
    busy = [0.0] * (devices // each)
    for flops in sorted(parts, reverse=True):
        busy[busy.index(min(busy))] += flops / each
    return max(busy)


def _total(arm: Arm, flops: Mapping[str, float]) -> float:
    return flops[f"arms/{arm.name}"] + flops.get(arm.source.phase, 0.0)


def _beforehand(name: str, phases: Mapping[str, Phase]) -> set[str]:
    """Names of all phases that must be finished before a phase."""
    reads = [other for other in phases[name].reads if other in phases]
    return set(reads).union(*(_beforehand(other, phases) for other in reads))
