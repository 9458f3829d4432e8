"""The phases of a recipe: what each reads, trains and writes into a folder of its own."""

import math
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from transformers import AutoImageProcessor, PreTrainedModel, ProgressCallback, TrainerState
from transformers.image_processing_utils import BaseImageProcessor
from transformers.integrations import get_reporting_integration_callbacks

from m2mkd.data.loading import default_workers
from m2mkd.data.processing import build_image_processor
from m2mkd.modeling.meta_from_teacher import fit_image_size, meta_from_teacher
from m2mkd.modeling.pair_files import load_stage, save_pair
from m2mkd.modeling.stages import check_same_normalization, check_stitchable, split_into_stages
from m2mkd.trainer.alignment import AlignmentTrainer, hybrid_accuracies, hybrids_sentence, judge_hybrids
from m2mkd.trainer.callbacks import DataEpoch, ShownProgress, Stopwatch
from m2mkd.trainer.evaluation import evaluate_model, expert_load
from m2mkd.trainer.flops import count_parameters, training_flops_per_image
from m2mkd.trainer.folders import (
    EVAL_RESULTS,
    TRAIN_RESULTS,
    RunError,
    explained_write_errors,
    is_finished,
    keep_tracker_files,
    last_complete_checkpoint,
    read_json,
    write_folder,
    write_json,
)
from m2mkd.trainer.m2mkd_config import M2MKDConfig
from m2mkd.trainer.m2mkd_trainer import M2MKDTrainer
from m2mkd.trainer.networks import build_config, load_network, new_network, take_class_names, with_stitches
from m2mkd.trainer.recipe import Recipe, RecipeError, Training
from m2mkd.trainer.run_data import RunData
from m2mkd.trainer.schedule import Task
from m2mkd.trainer.screen import Screen


# Defaults of the phases, under those of the recipe.
_DEFAULTS = {
    "report_to": "none",
    # by default it follows the verbosity of transformers, which is turned down
    "disable_tqdm": False,
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_strategy": "epoch",
    "eval_strategy": "no",
}
_NO_TEACHER = {"alpha": 0.0}
_EQUAL_COMPUTE = "_equal_compute"
_SHARED = ("meta", "teacher")
# Training images that hybrids are measured on where the test set has other classes.
HYBRID_IMAGES = 2_000
BEFORE_ARMS = (*_SHARED, "pairs")
Results = dict[str, Any]


class Phases:
    """
    The phases of a recipe for one seed.

    Args:
        recipe (`Recipe`)
        data (`RunData`): The recipe's images.
        seed (`int`): The recipe's own, or one of its `repeat_seeds`, which share its meta model and teacher.
        screen (`Screen`): Shows what is done.
    """

    def __init__(self, recipe: Recipe, data: RunData, seed: int, screen: Screen):
        self.recipe, self.data, self.seed, self.screen = recipe, data, seed, screen
        self.shared = Path(recipe.output_dir)
        self.own = self.shared if seed == recipe.seed else self.shared / "seeds" / str(seed)
        self.depths = recipe.student.depths
        self.meta_depths = recipe.meta.depths or [1] * len(self.depths)

    def check(self) -> None:
        """Build every configuration before anything is trained. Raises `RecipeError` or `StageError`."""
        recipe = self.recipe
        for model, data in (
            (recipe.meta.model, recipe.meta.data),
            (recipe.teacher.model, recipe.teacher.data),
            (recipe.student.model, recipe.distill.data),
            (recipe.student.model, recipe.finetune.data),
        ):
            if model is not None:
                build_config(model, self.data.config(data), self.data.class_names(data))
        for key, training in (
            ("meta.training", recipe.meta.training),
            ("teacher.incubation", recipe.teacher.incubation),
            ("teacher.finetuning", recipe.teacher.finetuning),
            ("distill.training", recipe.distill.training),
            ("finetune.training", recipe.finetune.training),
            ("kd.training", {**recipe.finetune.training, **recipe.kd.training}),
        ):
            try:
                args = self._arguments(self.own, self.seed, training, {})
                for tracker in get_reporting_integration_callbacks(args.report_to):
                    # raises RuntimeError if its library is not installed
                    tracker()
            except (ValueError, TypeError, ImportError, RuntimeError) as error:
                raise RecipeError(f"The arguments of {key} (with those of training) are refused: {error}") from error

    def tasks(self) -> list[Task]:
        """The phases that are not finished, with those that each waits for. Says which are finished."""
        after = self._phases()
        finished = [phase for phase in after if self._is_finished(phase)]
        for phase in finished:
            self.screen.say(f"{self._name(phase)}: finished, skipped")
        return [
            Task(self._name(phase), (self.seed, phase), tuple(map(self._name, before)))
            for phase, before in after.items()
            if phase not in finished
        ]

    def _phases(self) -> dict[str, tuple[str, ...]]:
        """The phases that the recipe's arms need, each with those that it reads from."""
        arms, aligned = self.recipe.arms, self.recipe.meta.init == "from_teacher"
        incubated = self.recipe.teacher.pretrained is None and not aligned
        phases: dict[str, tuple[str, ...]] = {}
        if self.own == self.shared:
            if "m2mkd" in arms or ("kd" in arms and incubated):
                phases["meta"] = ("teacher",) if aligned else ()
            if "m2mkd" in arms or "kd" in arms:
                phases["teacher"] = ("meta",) if incubated else ()
        if "m2mkd" in arms:
            phases["pairs"] = ("meta", "teacher")
        reads = {"e2e": (), "kd": ("teacher",), "m2mkd": ("pairs",)}
        phases |= {arm: reads[arm] for arm in arms}
        if self.recipe.equal_compute and "m2mkd" in arms:
            phases |= {f"{arm}{_EQUAL_COMPUTE}": (arm, "pairs") for arm in arms if arm != "m2mkd"}
        return phases

    def _name(self, phase: str) -> str:
        """A phase in messages; the names of all seeds differ, but for what they share."""
        kind = "" if phase in BEFORE_ARMS else "arm "
        return f"[seed {self.recipe.seed if phase in _SHARED else self.seed}] {kind}{phase}"

    def _is_finished(self, phase: str) -> bool:
        if phase == "pairs":
            return not set(self._asked_pairs()) & set(self.missing_pairs())
        return is_finished(self.shared / phase if phase in _SHARED else self.own / "arms" / phase)

    def do(self, phase: str) -> None:
        """Run one phase whose predecessors are finished."""
        steps = {"meta": self.meta, "teacher": self.teacher, "pairs": self.distill}
        steps.get(phase, partial(self.arm, phase))()

    def _pair_folders(self) -> list[Path]:
        return [self.own / "pairs" / str(index) for index in range(len(self.depths))]

    def _asked_pairs(self) -> list[int]:
        pairs = self.recipe.distill.pairs
        return list(range(len(self.depths))) if pairs == "all" else pairs

    def missing_pairs(self) -> list[int]:
        """The pairs that the arms need and that are not distilled yet."""
        if "m2mkd" not in self.recipe.arms:
            return []
        return [index for index, folder in enumerate(self._pair_folders()) if not is_finished(folder)]

    def pairs_elsewhere(self) -> bool:
        """Whether pairs are missing that other machines are to distil."""
        return bool(set(self.missing_pairs()) - set(self._asked_pairs()))

    def say_which_pairs_are_missing(self) -> None:
        missing = self.missing_pairs()
        if missing:
            self._say(f"pairs {missing} are still to be distilled (set distill.pairs), then run the recipe again")

    # ---- Phases ----

    def meta(self) -> None:
        """[PT] Train the meta model end to end, or align it with a teacher."""
        folder, spec = self.shared / "meta", self.recipe.meta
        if spec.init == "from_teacher":
            self._align_meta(folder)
            return
        config = build_config(spec.model, self.data.config(spec.data), self.data.class_names(spec.data))
        model = new_network(config, self.meta_depths, self.recipe.seed)
        results = self._train(folder, "meta", spec.data, model, spec.training, _NO_TEACHER, seed=self.recipe.seed)
        self._save_model(folder, model, spec.data, results)

    def _align_meta(self, folder: Path) -> None:
        """Make the meta model of the teacher, and train its layers to reproduce the teacher's stage boundaries."""
        spec, depths = self.recipe.meta, self.recipe.teacher.depths
        teacher = self._load_teacher()
        self._check_processors(self._teacher_source(), spec.data)
        distill = self.recipe.distill.data
        student = build_config(self.recipe.student.model, self.data.config(distill), self.data.class_names(distill))
        check_stitchable(student, teacher.config, teacher.config)
        meta = meta_from_teacher(teacher, depths, self.meta_depths)
        before = self._hybrids(teacher, meta)
        cut = {"student_depths": self.meta_depths, "meta_depths": depths, "stitch": "none", "eval_strategy": "no"}
        results = self._train(
            folder,
            "meta: aligning its layers with the teacher",
            spec.data,
            meta,
            spec.training,
            {**cut, **_NO_TEACHER},
            teacher=teacher,
            seed=self.recipe.seed,
            trainer_class=AlignmentTrainer,
        )
        after = self._hybrids(teacher, meta)
        for when, measured in (("before", before), ("after", after)):
            self._say(f"meta, {when} alignment: {hybrids_sentence(measured)}")
        self._save_model(folder, meta, spec.data, {**results, "labels": 0, "before": before, "after": after})

    def _hybrids(
        self, teacher: PreTrainedModel, meta: PreTrainedModel, indices: Sequence[int] | None = None
    ) -> Results:
        """
        The accuracy of the hybrids on the IID test set if it has the distilled classes, else on training images.
        """
        spec = self.recipe.distill
        tested = self.data.shares_labels(self.recipe.evaluation.iid, self.data.class_names(spec.data))
        images = self._test_set(self.recipe.evaluation.iid, spec.data) if tested else None
        measured = hybrid_accuracies(
            split_into_stages(meta, self.meta_depths),
            split_into_stages(teacher, self.recipe.teacher.depths),
            range(len(self.depths)) if indices is None else indices,
            images or self.data.plain_set(spec.data, HYBRID_IMAGES),
            self._arguments(self.own / ".hybrids", self.seed, {}, {}).per_device_eval_batch_size,
            use_cpu=not torch.accelerator.is_available(),
        )
        return {**measured, "set": "IID test set" if tested else "training images"}

    def _check_hybrids(self, teacher: PreTrainedModel, meta: PreTrainedModel, indices: Sequence[int]) -> Results:
        """
        Measure the hybrids that the pairs are distilled from. Says which are weak. Raises `RunError` for noise.
        """
        measured = self._hybrids(teacher, meta, indices)
        noise, weak = judge_hybrids(measured)
        if noise or weak:
            warning = (
                f"Warning: meta model and teacher do not share a feature space at stage {', '.join([*noise, *weak])}; "
                f"{hybrids_sentence(measured)}."
            )
            self._say(warning)
        if noise:
            raise RunError(
                f"{warning} What stage {', '.join(noise)} gives there is noise, and is not distilled. Set `meta.init: "
                "from_teacher` (and leave `meta.model` out) to align the meta model with the teacher, or "
                "`distill.training.alpha: 0` to train the pairs by the labels alone."
            )
        return measured

    def teacher(self) -> None:
        """[MT + FT] Incubate the teacher's stages inside the meta model, then fine-tune the whole."""
        folder, spec = self.shared / "teacher", self.recipe.teacher
        if spec.pretrained is not None:
            self._evaluate_pretrained_teacher(folder)
            return
        seed = self.recipe.seed
        config = build_config(spec.model, self.data.config(spec.data), self.data.class_names(spec.data))
        model = new_network(config, spec.depths, seed)
        phases, aligned = {}, self.recipe.meta.init == "from_teacher"
        if not aligned:
            cut = {"student_depths": spec.depths, "meta_depths": self.meta_depths, "stitch": "none", **_NO_TEACHER}
            work, meta = self.shared / "teacher-incubation", load_network(self.shared / "meta")
            phases["incubation"] = self._train(
                work, "teacher: incubating its stages", spec.data, model, spec.incubation, cut, meta=meta, seed=seed
            )
        name = "teacher" if aligned else "teacher: fine-tuning"
        phases["finetuning"] = self._train(folder, name, spec.data, model, spec.finetuning, _NO_TEACHER, seed=seed)
        incubation = self.shared / "teacher-incubation"
        self._save_model(folder, model, spec.data, {**_total(phases), "phases": phases}, [incubation])
        self._remove_work(incubation)

    def _evaluate_pretrained_teacher(self, folder: Path) -> None:
        """A published teacher is not copied; its folder holds its results alone."""
        source, model = self.recipe.teacher.pretrained, self._load_teacher()
        evaluation = self._evaluate(model, self.recipe.distill.data)
        results = {"pretrained": source, "parameters": count_parameters(model), **_NOTHING_TRAINED}

        def write(temporary: Path) -> None:
            write_json(temporary / EVAL_RESULTS, evaluation)
            write_json(temporary / TRAIN_RESULTS, results)

        write_folder(folder, write)

    def distill(self) -> None:
        """[m2mKD] Distil those of the pairs asked for that are missing."""
        missing = self.missing_pairs()
        indices, folders = [index for index in self._asked_pairs() if index in missing], self._pair_folders()
        spec = self.recipe.distill
        teacher, meta = self._load_teacher(), load_network(self.shared / "meta")
        self._check_processors(self._teacher_source(), spec.data)
        self._check_processors(self.shared / "meta", spec.data)
        config = build_config(self.recipe.student.model, self.data.config(spec.data), self.data.class_names(spec.data))
        hybrids = None
        if self._arguments(self.own, self.seed, spec.training, {}).alpha > 0:
            # copies, so that this process keeps no more of either network than its pairs need
            hybrids = self._check_hybrids(self._load_teacher(), load_network(self.shared / "meta"), indices)
        # stages of other processes stay on the meta device
        student = new_network(config, self.depths, self.seed, indices)
        cut = {
            "student_depths": self.depths,
            "teacher_depths": self.recipe.teacher.depths,
            "meta_depths": self.meta_depths,
            "pairs": indices,
        }
        trained: list[M2MKDTrainer] = []
        work = self.own / "pairs" / f"work-{'-'.join(map(str, indices))}"
        results = self._train(
            work,
            f"distilling pairs {', '.join(map(str, indices))}",
            spec.data,
            student,
            spec.training,
            cut,
            teacher=teacher,
            meta=meta,
            on_trained=trained.append,
        )
        (trainer,) = trained
        for index, pair in trainer.trained_pairs().items():
            # pairs trained together share time and compute; the history is kept by each for its own curve
            share = {name: results[name] / len(indices) for name in ("train_seconds", "train_flops")}

            def write(temporary: Path, pair: Any = pair, share: Results = share) -> None:
                save_pair(pair, temporary, meta.config.hidden_size, **trainer.network_hashes)
                build_image_processor(self.data.config(spec.data)).save_pretrained(temporary)
                own = {**share, "parameters": count_parameters(pair), "hybrids": hybrids}
                write_json(temporary / TRAIN_RESULTS, {**results, **own})
                keep_tracker_files(_work_folder(work), temporary)

            write_folder(folders[index], write)
        self._remove_work(work)
        if not self.missing_pairs() and PartialState().is_main_process:
            # of a run that was killed between two pairs
            for leftover in (self.own / "pairs").glob(".work-*.work"):
                shutil.rmtree(leftover)

    def arm(self, title: str) -> None:
        """[FT / E2E / KD] The end-to-end phase of one arm, or a baseline once more with the FLOPs of m2mkd."""
        name = title.removesuffix(_EQUAL_COMPUTE)
        folder, spec = self.own / "arms" / title, self.recipe.finetune
        training, own, teacher = spec.training, dict(_NO_TEACHER), None
        if name == "kd":
            training, own = {**training, **self.recipe.kd.training}, {}
            teacher = self._load_teacher()
            self._check_processors(self._teacher_source(), spec.data)
        if title != name:
            plain = read_json(self.own / "arms" / name / TRAIN_RESULTS)
            # rounded up: the baseline never gets less
            epochs = math.ceil(self._flops_of_m2mkd() * plain["epochs"] / plain["train_flops"])
            if epochs <= plain["epochs"]:
                self._copy_arm(name, folder)
                return
            training = {**training, "num_train_epochs": epochs}
        model, extra = self._arm_model(name)
        if extra.get("reinitialized"):
            self._say(f"arm m2mkd: {extra['reinitialized']} do not fit the data {spec.data!r} and start anew")
        results = self._train(folder, f"arm {title}", spec.data, model, training, own, teacher=teacher)
        self._save_model(folder, model, spec.data, {**results, **extra})

    def _copy_arm(self, name: str, folder: Path) -> None:
        source = self.own / "arms" / name

        def write(temporary: Path) -> None:
            shutil.copytree(source, temporary, dirs_exist_ok=True)
            write_json(temporary / TRAIN_RESULTS, {**read_json(source / TRAIN_RESULTS), "same_as": name})

        write_folder(folder, write)
        self._say(f"{folder.name}: {name} takes the FLOPs of m2mkd or more, so its result counts for both")

    def _arm_model(self, name: str) -> tuple[PreTrainedModel, Results]:
        spec, student = self.recipe.finetune, self.recipe.student
        data, class_names = self.data.config(spec.data), self.data.class_names(spec.data)
        model = new_network(build_config(student.model, data, class_names), self.depths, self.seed)
        if name != "m2mkd":
            return model, {}
        folders, misfits = self._pair_folders(), []
        for stage, folder in zip(split_into_stages(model, self.depths), folders, strict=True):
            misfits += load_stage(stage, folder, reinitialize=("classifier", "position_embeddings"))
        if spec.keep_stitches:
            model = with_stitches(model, folders)
        return model, {"reinitialized": misfits, "keep_stitches": spec.keep_stitches}

    # ---- What the phases share ----

    def _train(
        self,
        folder: Path,
        name: str,
        data: str,
        model: PreTrainedModel,
        training: Training,
        own: Training,
        teacher: PreTrainedModel | None = None,
        meta: PreTrainedModel | None = None,
        seed: int | None = None,
        on_trained: Callable[[M2MKDTrainer], None] | None = None,
        trainer_class: type[M2MKDTrainer] = M2MKDTrainer,
    ) -> Results:
        """Train `model` in place, from its last checkpoint if there is one. Returns what `train_results.json` says."""
        seed = self.seed if seed is None else seed
        work = _work_folder(folder)
        args = self._arguments(work, seed, training, own)
        networks = [network for network in (model, teacher, meta) if network is not None]
        trainer = self._trainer(args, data, model, teacher, meta, seed, trainer_class)
        flops_per_image = training_flops_per_image(trainer, networks)
        images = len(trainer.train_dataset)
        self._say(f"{name}: {images} images, {trainer.args.num_train_epochs:g} epochs")
        checkpoint = last_complete_checkpoint(work)
        stopwatch = Stopwatch(checkpoint)
        for callback in (DataEpoch(trainer.train_dataset), stopwatch):
            trainer.add_callback(callback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ShownProgress(f"[seed {seed}] {name}", self.screen))
        with explained_write_errors(work):
            history = _train_or_restore(trainer, checkpoint)
        if on_trained is not None:
            on_trained(trainer)
        epochs = float(trainer.args.num_train_epochs)
        results = {
            "train_seconds": stopwatch.seconds,
            "train_samples_seen": int(images * epochs),
            "train_flops": flops_per_image * images * epochs,
            "parameters": sum(count_parameters(stage) for stage in trainer.trained_pairs().values()),
            "images": images,
            "labels": images if trainer.args.alpha < 1 else 0,
            "epochs": epochs,
            # the Trainer's last entry sums up the session, not the training
            "log_history": [_without_clocks(entry) for entry in history if "train_loss" not in entry],
        }
        return results

    def _arguments(self, work: Path, seed: int, training: Training, own: Training) -> M2MKDConfig:
        # the Trainer's state outlives it; a phase may compute in another precision than the last one
        AcceleratorState._reset_state()
        use_cpu = not torch.accelerator.is_available()
        workers = default_workers(max(data.image_size for data in self.recipe.data.values()), use_cpu)
        device = {"use_cpu": use_cpu, "dataloader_pin_memory": not use_cpu, "dataloader_num_workers": workers}
        if use_cpu and PartialState().num_processes > 1:
            device["ddp_backend"] = "gloo"
        settings = {**_DEFAULTS, **device, **self.recipe.training, **training, **own}
        # to start workers anew each epoch takes longer than a short epoch
        settings.setdefault("dataloader_persistent_workers", settings["dataloader_num_workers"] > 0)
        return M2MKDConfig(output_dir=str(work), seed=seed, **settings)

    def _trainer(
        self,
        args: M2MKDConfig,
        data: str,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None,
        meta: PreTrainedModel | None,
        seed: int,
        trainer_class: type[M2MKDTrainer] = M2MKDTrainer,
    ) -> M2MKDTrainer:
        evaluates = args.eval_strategy != "no" and self._has_test_set(self.recipe.evaluation.iid, data)
        args.eval_strategy = args.eval_strategy if evaluates else "no"
        networks = {name: network for name, network in (("teacher", teacher), ("meta", meta)) if network is not None}
        return trainer_class(
            model=model,
            args=args,
            **networks,
            train_dataset=self.data.training_set(data, seed),
            eval_dataset=self._test_set(self.recipe.evaluation.iid, data) if evaluates else None,
        )

    def _test_set(self, name: str, like: str) -> Any:
        return self.data.test_set(name, like, self.data.class_names(like))

    def _has_test_set(self, name: str, like: str) -> bool:
        """A meta model or teacher may be trained on other classes than the arms; then it is not tested on theirs."""
        is_arms_data = like == self.recipe.finetune.data
        return is_arms_data or self.data.shares_labels(name, self.data.class_names(like))

    def _evaluate(self, model: PreTrainedModel, data: str) -> Results:
        """`iid` and `ood` of `eval_results.json` for a model trained on `data`, and its experts' load."""
        results: Results = {"iid": None, "ood": None, "expert_load": None}
        batch_size = self._arguments(self.own / ".evaluation", self.seed, {}, {}).per_device_eval_batch_size
        use_cpu = not torch.accelerator.is_available()
        for key, name in (("iid", self.recipe.evaluation.iid), ("ood", self.recipe.evaluation.ood)):
            if name is not None and self._has_test_set(name, data):
                test_set = self._test_set(name, data)
                results[key] = evaluate_model(model, test_set, batch_size, use_cpu)
                if key == "iid":
                    results["expert_load"] = expert_load(model, test_set, batch_size)
        return results

    def _save_model(
        self, folder: Path, model: PreTrainedModel, data: str, results: Results, before: Sequence[Path] = ()
    ) -> None:
        """Evaluate a trained model and write its folder. `before`: trainings that came before that of `folder`."""
        evaluation = self._evaluate(model, data)

        def write(temporary: Path) -> None:
            model.save_pretrained(temporary)
            build_image_processor(self.data.config(data)).save_pretrained(temporary)
            write_json(temporary / EVAL_RESULTS, evaluation)
            write_json(temporary / TRAIN_RESULTS, {**results, "parameters": count_parameters(model)})
            for training in (*before, folder):
                keep_tracker_files(_work_folder(training), temporary)

        write_folder(folder, write)
        self._remove_work(folder)
        scores = [
            f"{key.upper()} {100 * evaluation[key]['accuracy']:.2f} %" for key in ("iid", "ood") if evaluation[key]
        ]
        self._say(f"{folder.name}: {', '.join(scores) or 'not tested: other classes than the test set'}")

    def _load_teacher(self) -> PreTrainedModel:
        teacher, data = load_network(self._teacher_source()), self.recipe.distill.data
        fit_image_size(teacher, self.data.config(data).image_size)
        take_class_names(teacher.config, self.data.class_names(data))
        return teacher

    def _teacher_source(self) -> str | Path:
        return self.recipe.teacher.pretrained or self.shared / "teacher"

    def _check_processors(self, source: str | Path, data: str) -> None:
        try:
            theirs: BaseImageProcessor = AutoImageProcessor.from_pretrained(source)
        except OSError as error:
            raise RunError(
                f"{source} has no image processor ({error}), so nobody knows which pixels it takes."
            ) from error
        ours = build_image_processor(self.data.config(data))
        check_same_normalization(ours, theirs, (f"data set {data!r}", f"network {source}"))

    def _flops_of_m2mkd(self) -> float:
        """What the m2mkd arm of this seed takes: the distillation of its pairs and its end-to-end phase."""
        spec = self.recipe.finetune
        model, _ = self._arm_model("m2mkd")
        # the FLOPs of the end-to-end phase are counted here, so that no baseline has to wait for it
        args = self._arguments(self.own / "arms" / ".m2mkd.work", self.seed, spec.training, _NO_TEACHER)
        trainer = self._trainer(args, spec.data, model, None, None, self.seed)
        own = training_flops_per_image(trainer, [model]) * len(trainer.train_dataset) * args.num_train_epochs
        return own + sum(read_json(folder / TRAIN_RESULTS)["train_flops"] for folder in self._pair_folders())

    def _remove_work(self, folder: Path) -> None:
        if PartialState().is_main_process:
            shutil.rmtree(_work_folder(folder), ignore_errors=True)

    def _say(self, text: str) -> None:
        self.screen.say(f"[seed {self.seed}] {text}")


_NOTHING_TRAINED: Results = {
    "train_seconds": 0.0,
    "train_samples_seen": 0,
    "train_flops": 0.0,
    "images": 0,
    "labels": 0,
    "epochs": 0.0,
    "log_history": [],
}


def _work_folder(folder: Path) -> Path:
    """Where a training whose result goes to `folder` keeps its checkpoints."""
    return folder.parent / f".{folder.name}.work"


def _train_or_restore(trainer: M2MKDTrainer, checkpoint: Path | None) -> list[dict[str, Any]]:
    """Train from a checkpoint, or take its weights if it is the last one. Returns the log history."""
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step >= state.max_steps:
            # the Trainer would take one step too many
            trainer._load_from_checkpoint(str(checkpoint))
            return state.log_history
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    return trainer.state.log_history


def _without_clocks(entry: dict[str, Any]) -> dict[str, Any]:
    """A log entry without wall-clock readings, which differ from run to run, and without what is not finite."""
    clocks = ("runtime", "per_second")
    return {
        name: value
        for name, value in entry.items()
        if not name.endswith(clocks) and not (isinstance(value, float) and not math.isfinite(value))
    }


def _total(phases: dict[str, Results]) -> Results:
    summed = ("train_seconds", "train_samples_seen", "train_flops", "epochs")
    largest = ("images", "labels")
    return {
        **{name: sum(phase[name] for phase in phases.values()) for name in summed},
        **{name: max(phase[name] for phase in phases.values()) for name in largest},
        "log_history": [entry for phase in phases.values() for entry in phase["log_history"]],
    }
