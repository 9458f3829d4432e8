"""Shared parts of a run's phases: recipe, data and folder, and how networks are trained, tested and saved."""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from transformers import PreTrainedModel, ProgressCallback, TrainerState

from m2mkd.data.processing import build_image_processor
from m2mkd.distillation.load import load_network, load_processor
from m2mkd.distillation.pair_folder import tensors_sha256
from m2mkd.distillation.split import new_network
from m2mkd.distillation.stitch_init import FITTED_IMAGES
from m2mkd.distillation.target_cache import TargetCache
from m2mkd.evaluation.expert_load import expert_use
from m2mkd.evaluation.predict import predict
from m2mkd.experiment.artifact import EVAL_RESULTS, TRAIN_RESULTS, keep_tracker_files, last_complete_checkpoint
from m2mkd.experiment.flops import count_parameters, training_flops_per_image
from m2mkd.experiment.machine import default_workers, peak_memory, reset_peak_memory
from m2mkd.experiment.networks import build_config, fit_to_data
from m2mkd.experiment.progress import ShownProgress
from m2mkd.experiment.recipe import NetworkSpec, Recipe
from m2mkd.experiment.recipe_networks import check_pixels
from m2mkd.experiment.run_data import RunData
from m2mkd.experiment.run_folder import RunFolder, work_folder
from m2mkd.experiment.section import Training
from m2mkd.files import explained_write_errors, write_folder, write_json
from m2mkd.screen import Screen
from m2mkd.trainer.callbacks import DataEpoch, Stopwatch
from m2mkd.trainer.m2mkd_config import M2MKDConfig
from m2mkd.trainer.m2mkd_trainer import M2MKDTrainer


# Defaults of the phases; the recipe overrides them.
_DEFAULTS = {
    "report_to": "none",
    # the default follows the verbosity of transformers, which is lowered
    "disable_tqdm": False,
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_strategy": "epoch",
    "eval_strategy": "no",
}
# Arguments of a phase without a teacher.
NO_TEACHER = {"alpha": 0.0}
Results = dict[str, Any]


class Session:
    """
    One seed of a recipe while it runs.

    Args:
        recipe (`Recipe`)
        data (`RunData`): The recipe's images.
        seed (`int`): The recipe's own, or one of its `repeat_seeds`, which share its meta model and teacher.
        screen (`Screen`): Shows the progress.
    """

    def __init__(self, recipe: Recipe, data: RunData, seed: int, screen: Screen):
        self.recipe, self.data, self.seed, self.screen = recipe, data, seed, screen
        self.folder = RunFolder(recipe.output_dir, recipe.seed)
        self.depths = recipe.student.depths
        self.meta_depths = recipe.meta_depths

    def say(self, text: str) -> None:
        """Print a line that starts with the seed."""
        self.screen.say(f"[seed {self.seed}] {text}")

    def with_pairs(self, pairs: list[int]) -> "Session":
        """The same seed in a run that distils only some pairs."""
        distill = self.recipe.distill.model_copy(update={"pairs": pairs})
        recipe = self.recipe.model_copy(update={"distill": distill})
        return Session(recipe, self.data, self.seed, self.screen)

    # ---- Networks ----

    def new_network(
        self, spec: NetworkSpec, data: str, depths: list[int], seed: int, indices: list[int] | None = None
    ) -> PreTrainedModel:
        """Build a network of the recipe for a data set; stages not in `indices` stay on the meta device."""
        return new_network(
            build_config(spec, self.data.config(data), self.data.class_names(data)), depths, seed, indices
        )

    def load_teacher(self) -> PreTrainedModel:
        """Load the trained or published teacher, adapted to the images and classes of the distillation."""
        teacher, data = load_network(self.teacher_source()), self.recipe.distill.data
        fit_to_data(teacher, self.data.config(data), self.data.class_names(data))
        return teacher

    def open_cache(self, data: str) -> TargetCache:
        """Open the teacher's stored targets for a training set. Raises `CacheError` if they are not this teacher's."""
        cache = TargetCache(self.folder.cache(data))
        cache.check(teacher_sha256=tensors_sha256(self.load_teacher().state_dict()))
        return cache

    def teacher_source(self) -> str | Path:
        """Hub id or folder of the teacher."""
        spec = self.recipe.teacher
        return self.folder.teacher if spec.pretrained is None or spec.probe else spec.pretrained

    def check_processors(self, source: str | Path, data: str, any_size: bool = False) -> None:
        """See [`check_pixels`]. Raises `DataError` or `StageError`."""
        check_pixels(data, self.data.config(data), f"network {source}", load_processor(source), any_size)

    # ---- Training ----

    def train(
        self,
        folder: Path,
        name: str,
        data: str,
        model: PreTrainedModel,
        training: Training,
        own: Training,
        teacher: PreTrainedModel | None = None,
        meta: PreTrainedModel | None = None,
        cache: str | None = None,
        on_trained: Callable[[M2MKDTrainer], None] | None = None,
        trainer_class: type[M2MKDTrainer] = M2MKDTrainer,
    ) -> Results:
        """
        Train `model` in place, from its last checkpoint if there is one.

        Args:
            folder (`Path`): The artifact; its checkpoints are next to it.
            name (`str`): Name on the screen.
            data (`str`): Name of the training set.
            model (`PreTrainedModel`)
            training (`dict`): The recipe's arguments of the phase.
            own (`dict`): Arguments that the phase itself sets; they override the others.
            teacher, meta (`PreTrainedModel`, *optional*): As in the trainer.
            cache (`str`, *optional*): The training set, if its stored targets take the place of the teacher.
            on_trained (`Callable`, *optional*): Called with the trainer after training.
            trainer_class (`type`)

        Returns:
            The content of `train_results.json`.
        """
        work = work_folder(folder)
        args = self.arguments(work, training, own)
        networks = [network for network in (model, teacher, meta) if network is not None]
        trainer = self.trainer(args, data, model, teacher, meta, cache, trainer_class)
        flops_per_image = training_flops_per_image(trainer, networks)
        self.say(f"{name}: {len(trainer.train_dataset)} images, {trainer.args.num_train_epochs:g} epochs")
        checkpoint = last_complete_checkpoint(work)
        stopwatch = Stopwatch(checkpoint)
        reset_peak_memory()
        trainer.remove_callback(ProgressCallback)
        progress = ShownProgress(f"[seed {self.seed}] {name}", self.screen)
        for callback in (DataEpoch(trainer.train_dataset), stopwatch, progress):
            trainer.add_callback(callback)
        with explained_write_errors(work):
            history = _train_or_restore(trainer, checkpoint)
        if on_trained is not None:
            on_trained(trainer)
        return {
            "cache": cache,
            "train_seconds": stopwatch.seconds,
            **_costs(trainer, flops_per_image),
            # the Trainer's last entry summarizes the session, not the training
            "log_history": [_without_clocks(entry) for entry in history if "train_loss" not in entry],
        }

    def arguments(self, work: Path, training: Training, own: Training) -> M2MKDConfig:
        """Build the arguments of a phase: defaults, the recipe's for all phases, the phase's, and those it sets."""
        # the Trainer's state outlives it; a phase may use another precision than the last one
        AcceleratorState._reset_state()
        use_cpu = not torch.accelerator.is_available()
        workers = default_workers(max(data.image_size for data in self.recipe.data.values()), use_cpu)
        device = {"use_cpu": use_cpu, "dataloader_pin_memory": not use_cpu, "dataloader_num_workers": workers}
        if use_cpu and PartialState().num_processes > 1:
            device["ddp_backend"] = "gloo"
        settings = {**_DEFAULTS, **device, **self.recipe.training, **training, **own}
        # restarting the workers each epoch takes longer than a short epoch
        settings.setdefault("dataloader_persistent_workers", settings["dataloader_num_workers"] > 0)
        return M2MKDConfig(output_dir=str(work), seed=self.seed, **settings)

    def trainer(
        self,
        args: M2MKDConfig,
        data: str,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None = None,
        meta: PreTrainedModel | None = None,
        cache: str | None = None,
        trainer_class: type[M2MKDTrainer] = M2MKDTrainer,
    ) -> M2MKDTrainer:
        """Build a trainer for a data set of the recipe; it evaluates on the IID set if that is asked and possible."""
        evaluates = args.eval_strategy != "no" and self.has_test_set(self.recipe.evaluation.iid, data)
        args.eval_strategy = args.eval_strategy if evaluates else "no"
        given = {"teacher": teacher, "meta": meta, "targets": cache and self.open_cache(cache)}
        return trainer_class(
            model=model,
            args=args,
            **{name: value for name, value in given.items() if value is not None},
            # all seeds share the stored views
            train_dataset=self.data.training_set(data, self.seed if cache is None else self.recipe.seed),
            eval_dataset=self.test_set(self.recipe.evaluation.iid, data) if evaluates else None,
        )

    # ---- Testing and saving ----

    def test_set(self, name: str, like: str) -> Any:
        """A test set for a model trained on the data set `like`."""
        return self.data.test_set(name, like, self.data.class_names(like))

    def has_test_set(self, name: str, like: str) -> bool:
        """
        Whether a model trained on `like` can be tested on a set: meta model and teacher may be trained on other
        classes than the arms.
        """
        is_arms_data = like in map(self.recipe.data_of, self.recipe.all_arms.values())
        return is_arms_data or self.data.shares_labels(name, self.data.class_names(like))

    def eval_batch_size(self) -> int:
        """Images per device in evaluations."""
        return self.arguments(self.folder.path / ".evaluation", {}, {}).per_device_eval_batch_size

    def evaluate(self, model: PreTrainedModel, data: str) -> Results:
        """
        Compute what `eval_results.json` says of a model trained on `data`: `iid`, `ood`, and on the IID test set
        `per_class`, `expert_load` and `dropped`.
        """
        results: Results = {"iid": None, "ood": None, "per_class": None, "expert_load": None, "dropped": None}
        batch_size, use_cpu = self.eval_batch_size(), not torch.accelerator.is_available()
        for key, name in (("iid", self.recipe.evaluation.iid), ("ood", self.recipe.evaluation.ood)):
            if name is not None and self.has_test_set(name, data):
                test_set = self.test_set(name, data)
                predictions = predict(model, test_set, batch_size, use_cpu)
                results[key] = predictions.summary()
                if key == "iid":
                    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
                    results |= {"per_class": predictions.per_class(names), **expert_use(model, test_set, batch_size)}
        return results

    def save_model(
        self, folder: Path, model: PreTrainedModel, data: str, results: Results, before: Sequence[Path] = ()
    ) -> None:
        """Test a trained model and write its folder. `before`: earlier trainings of the same model."""
        evaluation = self.evaluate(model, data)

        def write(temporary: Path) -> None:
            model.save_pretrained(temporary)
            build_image_processor(self.data.config(data)).save_pretrained(temporary)
            write_json(temporary / EVAL_RESULTS, evaluation)
            write_json(temporary / TRAIN_RESULTS, {**results, "parameters": count_parameters(model)})
            for training in (*before, folder):
                keep_tracker_files(work_folder(training), temporary)

        write_folder(folder, write)
        self.remove_work(folder)
        scores = [
            f"{key.upper()} {100 * evaluation[key]['accuracy']:.2f} %" for key in ("iid", "ood") if evaluation[key]
        ]
        self.say(
            f"{folder.name}: {', '.join(scores) or 'not tested, because its classes are not those of the test set'}"
        )

    def remove_work(self, folder: Path) -> None:
        """Delete the checkpoints of a finished artifact."""
        if PartialState().is_main_process:
            shutil.rmtree(work_folder(folder), ignore_errors=True)


def _train_or_restore(trainer: M2MKDTrainer, checkpoint: Path | None) -> list[dict[str, Any]]:
    """
    Train from a checkpoint, or take its weights if it is the last one; for no epochs, do nothing. Returns the log
    history.
    """
    if trainer.args.num_train_epochs == 0 and trainer.args.max_steps <= 0:
        return []
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step >= state.max_steps:
            # the Trainer would do one step too many
            trainer.restore(checkpoint)
            return state.log_history
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    return trainer.state.log_history


def _costs(trainer: M2MKDTrainer, flops_per_image: float) -> Results:
    """What a training has seen, taken and made."""
    args, images = trainer.args, len(trainer.train_dataset)
    epochs = float(args.num_train_epochs)
    if args.max_steps > 0:
        images_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        epochs = args.max_steps * images_per_step / images
    fitted = min(FITTED_IMAGES, images) if args.stitch_init == "least_squares" else 0
    return {
        "train_samples_seen": int(images * epochs),
        "train_flops": flops_per_image * (images * epochs + fitted),
        "peak_memory": peak_memory(),
        "parameters": sum(count_parameters(stage) for stage in trainer.trained_pairs().values()),
        "images": images if epochs else 0,
        "labels": images if epochs and args.alpha < 1 else 0,
        "epochs": epochs,
    }


def _without_clocks(entry: dict[str, Any]) -> dict[str, Any]:
    """Copy a log entry without wall-clock times, which differ from run to run, and without non-finite values."""
    clocks = ("runtime", "per_second")
    return {
        name: value
        for name, value in entry.items()
        if not name.endswith(clocks) and not (isinstance(value, float) and not math.isfinite(value))
    }
