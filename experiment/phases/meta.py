"""[PT] The meta model: trained with the labels, or made from the teacher and aligned with it."""

from pathlib import Path
from typing import TYPE_CHECKING

from m2mkd.distillation.meta_from_teacher import meta_from_teacher
from m2mkd.evaluation.hybrids import hybrids_sentence
from m2mkd.experiment.hybrids import measure_hybrids, say_if_teacher_is_weak
from m2mkd.experiment.phases.phase import Phase
from m2mkd.experiment.section import Training
from m2mkd.experiment.session import NO_TEACHER
from m2mkd.trainer.alignment_trainer import AlignmentTrainer


if TYPE_CHECKING:
    from m2mkd.experiment.plan.costs import Costs, PhaseCost


class MetaPhase(Phase):
    """The meta model, trained end to end with the labels."""

    name = "meta"
    is_shared = True
    sections = ("meta", "evaluation")

    @property
    def artifacts(self) -> list[Path]:
        """`meta`."""
        return [self.session.folder.meta]

    @property
    def data(self) -> tuple[str, ...]:
        """Its training set and the test sets."""
        return (self.recipe.meta.data, *self.tested_on())

    def training_arguments(self) -> dict[str, Training]:
        """The training arguments of `meta`."""
        return {"meta.training": self.recipe.meta.training}

    def run(self) -> None:
        """Train it."""
        session, spec = self.session, self.recipe.meta
        folder = session.folder.meta
        model = session.new_network(spec.model, spec.data, session.meta_depths, session.seed)
        results = session.train(folder, "meta", spec.data, model, spec.training, NO_TEACHER)
        session.save_model(folder, model, spec.data, results)

    def cost(self, costs: "Costs") -> list["PhaseCost"]:
        """Cost of the steps of the whole model."""
        spec = self.recipe.meta
        return [costs.phase("meta", spec.data, spec.training, costs.whole(costs.meta, spec.data))]


class AlignedMetaPhase(MetaPhase):
    """The meta model made from the teacher: its layers learn the teacher's stage boundaries, without labels."""

    reads = ("teacher",)
    # the student must be stitchable, but these weights do not depend on it
    sections = ("meta", "teacher.depths", "evaluation")

    def run(self) -> None:
        """Make it from the teacher and align it; measure the hybrids before and after."""
        session, spec, depths = self.session, self.recipe.meta, self.recipe.teacher.depths
        folder = session.folder.meta
        teacher = session.load_teacher()
        session.check_processors(session.teacher_source(), spec.data)
        meta = meta_from_teacher(teacher, depths, session.meta_depths)
        before = measure_hybrids(session, teacher, meta)
        say_if_teacher_is_weak(session, before)
        cut = {
            "student_depths": session.meta_depths,
            "meta_depths": depths,
            "stitch": "none",
            "eval_strategy": "no",
            **NO_TEACHER,
        }
        results = session.train(
            folder,
            "meta: aligning its layers with the teacher",
            spec.data,
            meta,
            spec.training,
            cut,
            teacher=teacher,
            trainer_class=AlignmentTrainer,
        )
        after = measure_hybrids(session, teacher, meta)
        for when, measured in (("before", before), ("after", after)):
            session.say(f"meta, {when} alignment: {hybrids_sentence(measured)}")
        session.save_model(folder, meta, spec.data, {**results, "labels": 0, "before": before, "after": after})

    def cost(self, costs: "Costs") -> list["PhaseCost"]:
        """Cost of the steps of its layers on the boundaries of the teacher's stages."""
        spec = self.recipe.meta
        return [costs.phase("meta", spec.data, spec.training, costs.aligned(spec.data))]
