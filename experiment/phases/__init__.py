"""The phases of a run. A new kind of phase is a class here and a line in `phases_of`."""

from collections.abc import Iterable, Mapping

from m2mkd.experiment.arms import Arm
from m2mkd.experiment.phases.arm import ArmPhase
from m2mkd.experiment.phases.cache import CachePhase
from m2mkd.experiment.phases.dense import DensePhase
from m2mkd.experiment.phases.meta import AlignedMetaPhase, MetaPhase
from m2mkd.experiment.phases.pairs import PairsPhase
from m2mkd.experiment.phases.phase import Phase
from m2mkd.experiment.phases.probe import ProbedTeacherPhase
from m2mkd.experiment.phases.teacher import IncubatedTeacherPhase, PublishedTeacherPhase, TrainedTeacherPhase
from m2mkd.experiment.recipe import Recipe
from m2mkd.experiment.session import Session


def phases_of(session: Session, arms: Iterable[Arm] | None = None) -> dict[str, Phase]:
    """
    Build the phases that the arms of a recipe need, by name, each after those that it reads.

    Args:
        session (`Session`): The seed at work. Phases that all seeds share belong to the first seed.
        arms (`Iterable[Arm]`, *optional*): The arms. `None`: those of the recipe.
    """
    recipe = session.recipe
    meta = AlignedMetaPhase if recipe.is_aligned else MetaPhase
    beforehand: list[Phase] = [meta(session)] if recipe.meta is not None else []
    arms = list(arms or recipe.all_arms.values())
    cached = dict.fromkeys([recipe.distill.data, *map(recipe.data_of, arms)])
    beforehand += [_teacher_phase(recipe)(session)]
    beforehand += [*(CachePhase(session, data) for data in cached), PairsPhase(session)]
    beforehand += [DensePhase(session)] if recipe.upcycle is not None else []
    known = {phase.name: phase for phase in [*beforehand, *(ArmPhase(session, arm) for arm in arms)]}
    needed: set[str] = set()
    for name in known:
        if name.startswith("arms/"):
            _need(name, known, needed)
    ordered: dict[str, Phase] = {}
    for name in known:
        if name in needed:
            _order(name, known, ordered)
    return ordered


def _teacher_phase(recipe: Recipe) -> type[TrainedTeacherPhase]:
    if recipe.teacher.pretrained is not None:
        return ProbedTeacherPhase if recipe.teacher.probe else PublishedTeacherPhase
    return IncubatedTeacherPhase if recipe.is_incubated else TrainedTeacherPhase


def _need(name: str, known: Mapping[str, Phase], needed: set[str]) -> None:
    if name in known:
        needed.add(name)
        for other in known[name].reads:
            _need(other, known, needed)


def _order(name: str, known: Mapping[str, Phase], ordered: dict[str, Phase]) -> None:
    if name in known and name not in ordered:
        for other in known[name].reads:
            _order(other, known, ordered)
        ordered[name] = known[name]


__all__ = [
    "AlignedMetaPhase",
    "ArmPhase",
    "CachePhase",
    "DensePhase",
    "IncubatedTeacherPhase",
    "MetaPhase",
    "PairsPhase",
    "Phase",
    "ProbedTeacherPhase",
    "PublishedTeacherPhase",
    "TrainedTeacherPhase",
    "phases_of",
]
