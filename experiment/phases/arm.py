"""[FT / E2E / KD] The end-to-end phase of an arm."""

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from m2mkd.distillation.load import load_network
from m2mkd.distillation.pair_folder import load_stage, with_stitches
from m2mkd.distillation.split import split_into_stages
from m2mkd.distillation.upcycling import upcycle_into
from m2mkd.experiment.arms import Arm
from m2mkd.experiment.artifact import TRAIN_RESULTS, read_results
from m2mkd.experiment.flops import training_flops_per_image
from m2mkd.experiment.phases.phase import Phase
from m2mkd.experiment.run_folder import work_folder
from m2mkd.experiment.section import Training
from m2mkd.experiment.session import NO_TEACHER, Results, Session
from m2mkd.files import write_folder, write_json
from m2mkd.trainer.m2mkd_config import M2MKDConfig


if TYPE_CHECKING:
    from m2mkd.experiment.plan.costs import Costs, PhaseCost


class ArmPhase(Phase):
    """
    Trains a student from its initial weights to its results.

    Args:
        session (`Session`)
        arm (`Arm`)
    """

    def __init__(self, session: Session, arm: Arm):
        super().__init__(session)
        self.arm, self.name = arm, f"arms/{arm.name}"
        # an arm that lies in the folder may have the budget of one that the recipe leaves out
        self.spent = session.recipe.all_arms.get(arm.budget)
        made = [own.source.phase for own in (arm, self.spent) if own is not None and own.source.phase is not None]
        is_copy = arm.spec.init == "upcycled" and not made
        teacher = ["teacher"] if arm.has_teacher or is_copy else []
        sibling = [f"arms/{arm.sibling}"] if arm.sibling is not None else []
        self.cache = self.recipe.cache_of(arm)
        needed = [name for own in (arm, self.spent) if own is not None for name in self.recipe.caches_of(own)]
        caches = [f"cache/{name}" for name in needed]
        self.reads = tuple(dict.fromkeys([*made, *teacher, *sibling, *caches]))
        own = [section for section, is_read in (("kd", arm.has_teacher), ("upcycle", is_copy)) if is_read]
        self.sections = ("student", "finetune", "evaluation", f"arms.{arm.name}", *own)
        # the longest first; an arm that reads pairs comes last anyway
        self.rank = 2 * (arm.budget is None) + (not arm.has_teacher)

    @property
    def artifacts(self) -> list[Path]:
        """`arms/<name>`."""
        return [self.session.folder.arm(self.arm.name, self.session.seed)]

    @property
    def data(self) -> tuple[str, ...]:
        """The training set and the test sets."""
        return (self.recipe.data_of(self.arm), *self.tested_on())

    def training_arguments(self) -> dict[str, Training]:
        """The training arguments of the arm, under the most specific key."""
        is_taught = self.arm.has_teacher and self.recipe.kd.training
        key = f"arms.{self.arm.name}" if self.arm.spec.training else "kd" if is_taught else "finetune"
        return {f"{key}.training": self.training()}

    def training(self) -> Training:
        """The recipe's arguments: those of `finetune`, with a teacher those of `kd`, and the arm's own."""
        taught = self.recipe.kd.training if self.arm.has_teacher else {}
        return {**self.recipe.finetune.training, **taught, **self.arm.spec.training}

    def run(self) -> None:
        """Train it, or copy its sibling's model if that has already used up the budget."""
        session, data = self.session, self.recipe.data_of(self.arm)
        (folder,) = self.artifacts
        if self.arm.has_teacher:
            session.check_processors(session.teacher_source(), data)
        training = self.training()
        if self.spent is not None:
            training = {**training, "num_train_epochs": self._epochs_of_budget(), "max_steps": -1}
            if self.arm.sibling is not None and training["num_train_epochs"] <= self._sibling_results()["epochs"]:
                self._copy_sibling(folder)
                return
        model, extra = self.student()
        if extra.get("reinitialized"):
            session.say(
                f"arm {self.arm.name}: {extra['reinitialized']} do not fit the data {data!r} and are re-initialized"
            )
        own = {} if self.arm.has_teacher else NO_TEACHER
        networks = {"teacher": self._teacher(), "cache": self.cache}
        results = session.train(folder, f"arm {self.arm.name}", data, model, training, own, **networks)
        session.save_model(folder, model, data, {**results, **extra, "arm": self.arm.words()})

    def _teacher(self) -> PreTrainedModel | None:
        return self.session.load_teacher() if self.arm.has_teacher and self.cache is None else None

    def _flops_of_caches(self) -> float:
        caches = self.recipe.caches_of(self.arm)
        return sum(read_results(self.session.folder.cache(name))["train_flops"] for name in caches)

    def student(self) -> tuple[PreTrainedModel, Results]:
        """Build the student that the end-to-end phase starts with, and the facts about it for the results."""
        session, spec = self.session, self.recipe.finetune
        model = session.new_network(
            self.recipe.student.model, self.recipe.data_of(self.arm), session.depths, session.seed
        )
        if self.arm.spec.init == "upcycled":
            own = self.arm.source.phase is not None
            upcycle_into(model, load_network(session.folder.dense(session.seed)) if own else session.load_teacher())
            return model, {}
        if not self.arm.is_modular:
            return model, {}
        folders, misfits = [session.folder.pair(index, session.seed) for index in range(len(session.depths))], []
        for stage, folder in zip(split_into_stages(model, session.depths), folders, strict=True):
            misfits += load_stage(stage, folder, reinitialize=("classifier", "position_embeddings"))
        if spec.keep_stitches:
            model = with_stitches(model, folders)
        return model, {"reinitialized": misfits, "keep_stitches": spec.keep_stitches}

    def flops(self) -> float:
        """
        Compute the FLOPs of the arm, including its distillation and the targets that it reads. Its end-to-end phase is
        counted instead of read, so that arms with this budget do not have to wait for it.
        """
        session, total = self.session, self._flops_of_an_epoch() * self._arguments().num_train_epochs
        folders = [session.folder.pair(index, session.seed) for index in range(len(session.depths))]
        made = {"pairs": folders, "dense": [session.folder.dense(session.seed)], None: []}[self.arm.source.phase]
        return total + sum(read_results(folder)["train_flops"] for folder in made) + self._flops_of_caches()

    def _arguments(self) -> M2MKDConfig:
        (folder,) = self.artifacts
        own = {} if self.arm.has_teacher else NO_TEACHER
        return self.session.arguments(work_folder(folder), self.training(), own)

    def _flops_of_an_epoch(self) -> float:
        session, data = self.session, self.recipe.data_of(self.arm)
        model, _ = self.student()
        teacher = self._teacher()
        trainer = session.trainer(self._arguments(), data, model, teacher, cache=self.cache)
        networks = [network for network in (model, teacher) if network is not None]
        return training_flops_per_image(trainer, networks) * len(trainer.train_dataset)

    def _epochs_of_budget(self) -> int:
        """Number of epochs that the budget allows, rounded up: the arm never gets less than its budget."""
        budget = ArmPhase(self.session, self.spent).flops() - self._flops_of_caches()
        if self.arm.sibling is not None:
            plain = self._sibling_results()
            return max(1, math.ceil(budget * plain["epochs"] / plain["train_flops"]))
        return max(1, math.ceil(budget / self._flops_of_an_epoch()))

    def _sibling_folder(self) -> Path:
        return self.session.folder.arm(self.arm.sibling, self.session.seed)

    def _sibling_results(self) -> Results:
        return read_results(self._sibling_folder())

    def _copy_sibling(self, folder: Path) -> None:
        source, name = self._sibling_folder(), self.arm.sibling

        def write(temporary: Path) -> None:
            shutil.copytree(source, temporary, dirs_exist_ok=True)
            own = {"same_as": name, "arm": self.arm.words()}
            write_json(temporary / TRAIN_RESULTS, {**self._sibling_results(), **own})

        write_folder(folder, write)
        self.session.say(
            f"{folder.name}: {name} takes at least the FLOPs of {self.arm.budget}, so its result counts for both"
        )

    def cost(self, costs: "Costs") -> list["PhaseCost"]:
        """Cost of the steps of the whole student, and of the teacher that it learns from."""
        data = self.recipe.data_of(self.arm)
        step = costs.whole(costs.network(self.recipe.student.model, data), data)
        if self.arm.has_teacher and self.cache is None:
            step += costs.frozen(costs.teacher, data)
        return [costs.phase(f"arm {self.arm.name}", data, self.training(), step)]
