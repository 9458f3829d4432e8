"""[m2mKD] The distilled pairs."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from m2mkd.data.processing import build_image_processor
from m2mkd.distillation.load import load_network
from m2mkd.distillation.pair_folder import save_pair
from m2mkd.experiment.artifact import TRAIN_RESULTS, is_finished, keep_tracker_files
from m2mkd.experiment.flops import count_parameters
from m2mkd.experiment.hybrids import check_hybrids
from m2mkd.experiment.phases.phase import Phase
from m2mkd.experiment.run_folder import work_folder
from m2mkd.experiment.section import Training
from m2mkd.experiment.session import Results, Session
from m2mkd.files import write_folder, write_json
from m2mkd.trainer.m2mkd_trainer import M2MKDTrainer


if TYPE_CHECKING:
    from m2mkd.experiment.plan.costs import Costs, PhaseCost


class PairsPhase(Phase):
    """The pairs that this run distils, in one process, with one pass through the network around them."""

    name = "pairs"

    def __init__(self, session: Session):
        super().__init__(session)
        self._has_meta = self.recipe.distill.context == "meta"
        spec = self.recipe.distill
        self.cache = spec.data if spec.cache else None
        cache = (f"cache/{self.cache}",) if self.cache else ()
        self.reads = ("meta", "teacher") if self._has_meta else ("teacher", *cache)
        own = ("meta.depths",) if self._has_meta else ()
        self.sections = ("student", "distill", "teacher.depths", *own)

    @property
    def asked(self) -> list[int]:
        """The pairs to distil in this run."""
        pairs = self.recipe.distill.pairs
        return list(range(len(self.session.depths))) if pairs == "all" else pairs

    @property
    def artifacts(self) -> list[Path]:
        """`pairs/<i>` of all pairs, including those that other processes distil."""
        return [self._folder(index) for index in range(len(self.session.depths))]

    @property
    def data(self) -> tuple[str, ...]:
        """The training set."""
        return (self.recipe.distill.data,)

    def by_name(self) -> dict[str, Phase]:
        """All pairs in one process, and each alone; not alone if the student feeds them."""
        folder, seed = self.session.folder, self.session.seed
        found: dict[str, Phase] = {folder.name_of(folder.pairs(seed)): self}
        if self.recipe.distill.feed == "student":
            return found
        return found | {
            folder.name_of(path): PairsPhase(self.session.with_pairs([index]))
            for index, path in enumerate(self.artifacts)
        }

    def training_arguments(self) -> dict[str, Training]:
        """The training arguments of `distill`."""
        return {"distill.training": self.recipe.distill.training}

    def _folder(self, index: int) -> Path:
        return self.session.folder.pair(index, self.session.seed)

    def _unfinished(self) -> list[int]:
        return [index for index in range(len(self.session.depths)) if not is_finished(self._folder(index))]

    def to_make(self) -> list[Path]:
        """The pairs to distil in this run that do not exist yet."""
        return [self._folder(index) for index in self._unfinished() if index in self.asked]

    def missing(self) -> list[int]:
        """The pairs that are not distilled yet and not to be distilled in this run."""
        return [index for index in self._unfinished() if index not in self.asked]

    def run(self) -> None:
        """Distil the missing pairs of this run."""
        session, spec = self.session, self.recipe.distill
        unfinished = self._unfinished()
        # fed by the student, a pair needs those before it, which end with the weights that they have
        is_chained = spec.feed == "student"
        indices = [index for index in self.asked if is_chained or index in unfinished]
        teacher = None if self.cache else session.load_teacher()
        meta = load_network(session.folder.meta) if self._has_meta else None
        session.check_processors(session.teacher_source(), spec.data)
        if self._has_meta:
            session.check_processors(session.folder.meta, spec.data)
        work = session.folder.pairs(session.seed) / f"work-{'-'.join(map(str, indices))}"
        hybrids = None
        if self._has_meta and session.arguments(work, spec.training, {}).alpha > 0:
            # copies, so that this process keeps only what its pairs need of both networks
            hybrids = check_hybrids(session, session.load_teacher(), load_network(session.folder.meta), indices)
        # stages of other processes stay on the meta device
        student = session.new_network(self.recipe.student.model, spec.data, session.depths, session.seed, indices)
        cut = {
            "student_depths": session.depths,
            "teacher_depths": self.recipe.teacher.depths,
            "meta_depths": session.meta_depths if self._has_meta else None,
            "pairs": indices,
            **spec.arguments(),
        }
        trained: list[M2MKDTrainer] = []
        results = session.train(
            work,
            f"distilling pairs {', '.join(map(str, indices))}",
            spec.data,
            student,
            spec.training,
            cut,
            teacher=teacher,
            meta=meta,
            cache=self.cache,
            on_trained=trained.append,
        )
        self._write(work, trained[0], {**results, "hybrids": hybrids})
        session.remove_work(work)
        if not self._unfinished() and PartialState().is_main_process:
            # left by a run that was killed between two pairs; that of another run may vanish meanwhile
            for leftover in session.folder.pairs(session.seed).glob(".work-*.work"):
                shutil.rmtree(leftover, ignore_errors=True)

    def _write(self, work: Path, trainer: M2MKDTrainer, results: Results) -> None:
        pairs, unfinished = trainer.trained_pairs(), self._unfinished()
        # pairs trained together divide time and compute; each keeps the history for its own curve
        share = {name: results[name] / len(pairs) for name in ("train_seconds", "train_flops")}
        processor = build_image_processor(self.session.data.config(self.recipe.distill.data))
        for index, pair in pairs.items():
            if index not in unfinished:
                continue

            def write(temporary: Path, pair: Any = pair) -> None:
                save_pair(pair, temporary, trainer.stitch_size, **trainer.network_hashes)
                processor.save_pretrained(temporary)
                write_json(temporary / TRAIN_RESULTS, {**results, **share, "parameters": count_parameters(pair)})
                keep_tracker_files(work_folder(work), temporary)

            write_folder(self._folder(index), write)

    def costs_of_own(self, costs: list["PhaseCost"]) -> list["PhaseCost"]:
        """The cost of the pair, if it is one; otherwise of all together, which comes last."""
        return [costs[self.asked[0]] if len(self.asked) == 1 else costs[-1]]

    def flops_of(self, costs: list["PhaseCost"]) -> float:
        """FLOPs of all pairs together, the last part; the others are the pairs one by one."""
        return costs[-1].flops

    def side_by_side(self, costs: list["PhaseCost"]) -> list[float]:
        """FLOPs of each pair alone; of all together if the student feeds them."""
        is_chained = self.recipe.distill.feed == "student"
        return super().side_by_side(costs) if is_chained else [part.flops for part in costs[:-1]]

    def cost(self, costs: "Costs") -> list["PhaseCost"]:
        """Cost of `pair <i>`, each alone in its own process, and of `pairs`, all together."""
        spec = self.recipe.distill
        student = costs.network(self.recipe.student.model, spec.data)
        names = ("stitch", "nac_codes", "read_in_latents")
        options = {name: spec.training[name] for name in names if name in spec.training}
        has_teacher = spec.training.get("alpha", 1) > 0 or spec.match == "boundary"
        pairs = costs.pairs(
            student,
            self.session.depths,
            spec.data,
            costs.teacher if has_teacher else None,
            None if self._has_meta else costs.teacher,
            match=spec.match,
            feed=spec.feed,
            **options,
        )
        if self.cache:
            pairs = pairs.without_context()
        everyone = range(len(self.session.depths))
        chosen = {f"pair {index}": range(index + 1) if spec.feed == "student" else [index] for index in everyone}
        return [
            costs.phase(name, spec.data, spec.training, pairs.together(indices))
            for name, indices in {**chosen, "pairs": everyone}.items()
        ]
