"""The dense network that the experts of upcycled arms are copies of."""

from pathlib import Path
from typing import TYPE_CHECKING

from m2mkd.experiment.phases.phase import Phase
from m2mkd.experiment.recipe import NetworkSpec
from m2mkd.experiment.section import Training
from m2mkd.experiment.session import NO_TEACHER, Session


if TYPE_CHECKING:
    from m2mkd.experiment.plan.costs import Costs, PhaseCost


class DensePhase(Phase):
    """The student without experts, trained end to end."""

    name = "dense"

    def __init__(self, session: Session):
        super().__init__(session)
        self.is_taught = self.recipe.upcycle.supervision == "teacher"
        self.reads = ("teacher",) if self.is_taught else ()
        self.sections = ("student", "finetune", "upcycle", "evaluation", *(("kd",) if self.is_taught else ()))

    @property
    def artifacts(self) -> list[Path]:
        """`dense`."""
        return [self.session.folder.dense(self.session.seed)]

    @property
    def training_set(self) -> str:
        """Name of its training set."""
        return self.recipe.upcycle.data or self.recipe.finetune.data

    @property
    def data(self) -> tuple[str, ...]:
        """Its training set and the test sets."""
        return (self.training_set, *self.tested_on())

    def network(self) -> NetworkSpec:
        """The student's network with a dense MLP in every layer."""
        model = self.recipe.student.model
        return model.model_copy(update={"config": {**model.config, "moe_layers": []}})

    def training_arguments(self) -> dict[str, Training]:
        """The training arguments of `finetune` and, with a teacher, of `kd`, and its own."""
        taught = self.recipe.kd.training if self.is_taught else {}
        return {"upcycle.training": {**self.recipe.finetune.training, **taught, **self.recipe.upcycle.training}}

    def run(self) -> None:
        """Train it."""
        session, data = self.session, self.training_set
        (folder,), (training,) = self.artifacts, self.training_arguments().values()
        teacher = session.load_teacher() if self.is_taught else None
        if self.is_taught:
            session.check_processors(session.teacher_source(), data)
        model = session.new_network(self.network(), data, session.depths, session.seed)
        own = {} if self.is_taught else NO_TEACHER
        results = session.train(folder, "dense network to upcycle", data, model, training, own, teacher=teacher)
        session.save_model(folder, model, data, results)

    def cost(self, costs: "Costs") -> list["PhaseCost"]:
        """Cost of the steps of the whole network, and of the teacher that it learns from."""
        (training,) = self.training_arguments().values()
        step = costs.whole(costs.network(self.network(), self.training_set), self.training_set)
        if self.is_taught:
            step += costs.frozen(costs.teacher, self.training_set)
        return [costs.phase("dense network to upcycle", self.training_set, training, step)]
