"""Base class of the phases of a run."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from m2mkd.experiment.artifact import is_finished
from m2mkd.experiment.recipe import Resources
from m2mkd.experiment.section import Training
from m2mkd.experiment.session import Session


if TYPE_CHECKING:
    from m2mkd.experiment.plan.costs import Costs, PhaseCost


class Phase(ABC):
    """
    One step of a run: it reads artifacts of other phases and makes its own.

    Args:
        session (`Session`)

    Attributes:
        name (`str`): Unique within a seed: `"meta"`, `"teacher"`, `"pairs"`, `"arms/<name>"`.
        reads (`tuple[str, ...]`): Names of the phases whose artifacts it reads.
        sections (`tuple[str, ...]`): Keys of the recipe that its artifact depends on, in addition to those of the
            phases that it reads; the keys of the data sets that they name are not repeated.
        is_shared (`bool`): Whether the further seeds use the artifact of the first.
        rank (`int`): Of several phases that could start, the one with the lowest rank starts first.
    """

    name: str
    reads: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()
    is_shared: ClassVar[bool] = False
    rank: int = 0

    def __init__(self, session: Session):
        self.session = session
        self.recipe = session.recipe

    @property
    def title(self) -> str:
        """Name of the phase in messages; different for each seed, unless the seeds share it."""
        seed = self.recipe.seed if self.is_shared else self.session.seed
        return f"[seed {seed}] {self.name.replace('arms/', 'arm ')}"

    @property
    def data(self) -> tuple[str, ...]:
        """Names of the data sets that its artifact depends on, in addition to those of the phases that it reads."""
        return ()

    @property
    @abstractmethod
    def artifacts(self) -> list[Path]:
        """The folders that it creates."""

    def by_name(self) -> dict[str, "Phase"]:
        """Phases that can run on their own, by the name of what they make: its path in the run's folder."""
        return {self.session.folder.name_of(path): self for path in self.artifacts}

    def parts(self) -> tuple[str, ...]:
        """What this run still makes, as small as can be made apart: keys of `by_name`."""
        to_make = set(self.to_make())
        unfinished = {name: own for name, own in self.by_name().items() if to_make & set(own.to_make())}
        return tuple(name for name, own in unfinished.items() if own is not self) or tuple(unfinished)

    def resources(self) -> Resources:
        """What the recipe states that it needs of a node."""
        return self.recipe.resources.get(self.name.partition("/")[0], Resources())

    def training_arguments(self) -> dict[str, Training]:
        """The recipe's arguments for its trainings, by their key in the recipe."""
        return {}

    def to_make(self) -> list[Path]:
        """The artifacts that this run makes and that do not exist yet."""
        return [folder for folder in self.artifacts if not is_finished(folder)]

    def is_finished(self) -> bool:
        """Whether all artifacts that this run makes exist."""
        return not self.to_make()

    def missing(self) -> list[int]:
        """Parts that other processes have to make before a phase that reads this one can start."""
        return []

    @abstractmethod
    def run(self) -> None:
        """Make the artifacts. The phases that it reads are finished."""

    @abstractmethod
    def cost(self, costs: "Costs") -> list["PhaseCost"]:
        """Cost of running it, part by part, counted on the meta device."""

    def costs_of_own(self, costs: list["PhaseCost"]) -> list["PhaseCost"]:
        """Of its costs, part by part, those of what this run makes."""
        return costs

    def flops_of(self, costs: list["PhaseCost"]) -> float:
        """FLOPs of all of it, from its [`cost`]."""
        return sum(part.flops for part in costs)

    def side_by_side(self, costs: list["PhaseCost"]) -> list[float]:
        """FLOPs of the parts that run at the same time, each on devices of its own."""
        return [self.flops_of(costs)]

    def tested_on(self) -> tuple[str, ...]:
        """Names of the recipe's test sets."""
        evaluation = self.recipe.evaluation
        return tuple(name for name in (evaluation.iid, evaluation.ood) if name is not None)
