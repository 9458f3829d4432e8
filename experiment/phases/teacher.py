"""[MT + FT] The teacher: incubated inside the meta model, trained as a whole, or published."""

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from m2mkd.distillation.load import load_network
from m2mkd.distillation.sizes import vision_config
from m2mkd.distillation.split import count_layers
from m2mkd.experiment.artifact import EVAL_RESULTS, TRAIN_RESULTS
from m2mkd.experiment.flops import count_parameters
from m2mkd.experiment.phases.phase import Phase
from m2mkd.experiment.section import Training
from m2mkd.experiment.session import NO_TEACHER, Results
from m2mkd.files import write_folder, write_json


if TYPE_CHECKING:
    from m2mkd.experiment.plan.costs import Costs, PhaseCost


_NOTHING_TRAINED: Results = {
    "train_seconds": 0.0,
    "train_samples_seen": 0,
    "train_flops": 0.0,
    "images": 0,
    "labels": 0,
    "epochs": 0.0,
    "log_history": [],
}


class TrainedTeacherPhase(Phase):
    """A teacher that is trained as a whole, because there is no meta model yet to incubate it in."""

    name = "teacher"
    is_shared = True
    sections = ("teacher", "evaluation")

    @property
    def artifacts(self) -> list[Path]:
        """`teacher`."""
        return [self.session.folder.teacher]

    @property
    def data(self) -> tuple[str, ...]:
        """Its training set and the test sets."""
        return (self.recipe.teacher.data, *self.tested_on())

    def training_arguments(self) -> dict[str, Training]:
        """The training arguments of its fine-tuning."""
        return {"teacher.finetuning": self.recipe.teacher.finetuning}

    def run(self) -> None:
        """Train it."""
        session, spec = self.session, self.recipe.teacher
        folder = session.folder.teacher
        model = session.new_network(spec.model, spec.data, spec.depths, session.seed)
        phases = {"finetuning": session.train(folder, "teacher", spec.data, model, spec.finetuning, NO_TEACHER)}
        session.save_model(folder, model, spec.data, {**_total(phases), "phases": phases})

    def cost(self, costs: "Costs") -> list["PhaseCost"]:
        """Cost of the steps of the whole network."""
        spec = self.recipe.teacher
        network = costs.network(spec.model, spec.data)
        return [costs.phase("teacher", spec.data, spec.finetuning, costs.whole(network, spec.data))]


class IncubatedTeacherPhase(TrainedTeacherPhase):
    """A teacher whose stages are trained inside the meta model, each on its own, and then fine-tuned as a whole."""

    reads = ("meta",)

    def training_arguments(self) -> dict[str, Training]:
        """The training arguments of its two steps."""
        return {"teacher.incubation": self.recipe.teacher.incubation, **super().training_arguments()}

    def run(self) -> None:
        """Incubate its stages, then fine-tune the whole."""
        session, spec = self.session, self.recipe.teacher
        folder = session.folder.teacher
        model = session.new_network(spec.model, spec.data, spec.depths, session.seed)
        cut = {"student_depths": spec.depths, "meta_depths": session.meta_depths, "stitch": "none", **NO_TEACHER}
        meta, incubation = load_network(session.folder.meta), session.folder.incubation
        phases = {
            "incubation": session.train(
                incubation, "teacher: incubating its stages", spec.data, model, spec.incubation, cut, meta=meta
            ),
            "finetuning": session.train(folder, "teacher: fine-tuning", spec.data, model, spec.finetuning, NO_TEACHER),
        }
        session.save_model(folder, model, spec.data, {**_total(phases), "phases": phases}, [incubation])
        session.remove_work(incubation)

    def cost(self, costs: "Costs") -> list["PhaseCost"]:
        """Cost of the steps of all its stages inside the meta model, then of the whole network."""
        spec = self.recipe.teacher
        network = costs.network(spec.model, spec.data)
        pairs = costs.pairs(network, spec.depths, spec.data, teacher=None, stitch="none")
        return [
            costs.phase("teacher: incubation", spec.data, spec.incubation, pairs.together()),
            costs.phase("teacher: fine-tuning", spec.data, spec.finetuning, costs.whole(network, spec.data)),
        ]


class PublishedTeacherPhase(TrainedTeacherPhase):
    """A published teacher. It is not copied: the folder contains only its results."""

    sections = ("teacher.pretrained", "evaluation")

    @property
    def data(self) -> tuple[str, ...]:
        """Its test sets, and the set whose images it gets."""
        return (self.recipe.distill.data, *self.tested_on())

    def run(self) -> None:
        """Test it."""
        session = self.session
        model = session.load_teacher()
        evaluation = session.evaluate(model, self.recipe.distill.data)
        source = self.recipe.teacher.pretrained
        results = {
            "pretrained": source,
            "network": describe_network(model, source),
            "parameters": count_parameters(model),
            **_NOTHING_TRAINED,
        }

        def write(temporary: Path) -> None:
            write_json(temporary / EVAL_RESULTS, evaluation)
            write_json(temporary / TRAIN_RESULTS, results)

        write_folder(session.folder.teacher, write)

    def cost(self, costs: "Costs") -> list["PhaseCost"]:
        """No cost: it is not trained here."""
        return []


def describe_network(model: PreTrainedModel, source: str) -> Results:
    """Facts about a pretrained network for the report: class, layers, width, and where it was loaded from."""
    is_folder = Path(source).is_dir()
    return {
        "class": type(model).__name__,
        "num_hidden_layers": count_layers(model),
        # a network of several widths has none of its own
        "hidden_size": getattr(vision_config(model.config), "hidden_size", None),
        # only the name: cards and reports are published, paths of a machine are not
        "folder": Path(source).resolve().name if is_folder else None,
        "id": None if is_folder else source,
    }


def _total(phases: dict[str, Results]) -> Results:
    summed = ("train_seconds", "train_samples_seen", "train_flops", "epochs")
    largest = ("images", "labels")
    return {
        **{name: sum(phase[name] for phase in phases.values()) for name in summed},
        **{name: max(phase[name] for phase in phases.values()) for name in largest},
        "peak_memory": max((own["peak_memory"] for own in phases.values() if own["peak_memory"]), default=None),
        "log_history": [entry for phase in phases.values() for entry in phase["log_history"]],
    }
