"""Trainer whose result is a student: it saves and pushes the student, whole or by modules."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import HubStrategy, TrainOutput
from transformers.utils import SAFE_WEIGHTS_NAME, PushInProgress, logging

from m2mkd.distillation.pair_folder import save_pair
from m2mkd.distillation.stitched_student import StitchedStudent
from m2mkd.model_cards.parts import CARD_FILE
from m2mkd.model_cards.trainer_card import render_trainer_card
from m2mkd.trainer.m2mkd_config import M2MKDConfig
from m2mkd.trainer.sharding import check_sharding, copy_to_shard, copy_whole


class StudentTrainer(Trainer):
    """
    A [`~transformers.Trainer`] of the stitched stages of a student. Checkpoints contain the stitched stages; at the
    end, the student is saved and pushed. A subclass sets `student`, `stitch_size` and `network_hashes`.

    With FSDP2 or DeepSpeed, `model` is a copy of the stitched stages, which the processes share by shards; the weights
    come back to the student at each checkpoint and at the end.

    Args:
        model (`StitchedStudent`): The stitched stages of the student.
        arguments: The other arguments of [`~transformers.Trainer`].
    """

    _tag_names = ["m2mkd", "image-classification", "knowledge-distillation"]
    student: PreTrainedModel
    stitch_size: int
    network_hashes: dict[str, str | None]

    def __init__(self, model: StitchedStudent, **arguments: Any):
        super().__init__(model=model, **arguments)
        self.stitched = model
        check_sharding(self)
        if self.is_sharded:
            self.model = self.model_wrapped = copy_to_shard(model, self.args.device)

    @property
    def is_sharded(self) -> bool:
        """Whether the processes share the trained weights by shards."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train, as [`~transformers.Trainer.train`]; then every process has the student's weights."""
        output = super().train(resume_from_checkpoint, **kwargs)
        self._collect_weights()
        return output

    def restore(self, checkpoint: str | Path) -> None:
        """Take the weights of a checkpoint, strictly, without training."""
        self.stitched.load_state_dict(load_file(Path(checkpoint) / SAFE_WEIGHTS_NAME))

    def _collect_weights(self) -> None:
        if self.is_sharded:
            copy_whole(self.accelerator.unwrap_model(self.model, keep_torch_compile=False), self.stitched)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._collect_weights()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            (folder / COMPLETE_MARKER).touch()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the student. A whole student becomes an ordinary Hugging Face folder. For a cut student, each trained pair
        is saved with its stitches in `<output_dir>/pairs/<index>`. With `push_to_hub`, the result is also pushed.
        """
        if _internal_call and output_dir is not None:
            # a checkpoint, from which training can continue
            if self.args.should_save:
                self._save(output_dir, state_dict=self.stitched.state_dict())
            return
        if self.args.should_save:
            self._save_student(Path(output_dir or self.args.output_dir))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_student(self, folder: Path) -> None:
        processors = [self.processing_class] if self.processing_class is not None else []
        if self.args.num_pairs == 1 or self.args.pairs == "all":
            self.student.save_pretrained(folder)
            for processor in processors:
                processor.save_pretrained(folder)
        if self.args.num_pairs > 1:
            for index, pair in self.trained_pairs().items():
                save_pair(pair, folder / "pairs" / str(index), self.stitch_size, **self.network_hashes)
                for processor in processors:
                    processor.save_pretrained(folder / "pairs" / str(index))

    # ---- The Hub ----

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """
        Push the files that [`~M2MKDTrainer.save_model`] writes; otherwise as [`~transformers.Trainer.push_to_hub`].
        """
        # a push in progress still reads the files that are written next
        self._finish_current_push()
        return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # the Trainer would take the weights of the checkpoint, which are those of the stitched stages, not the student
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_busy and not self.args.hub_always_push:
            return
        self._finish_current_push()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._save_student(Path(self.args.output_dir))
        self.create_model_card()
        step = f"Training in progress, step {self.state.global_step}"
        jobs = [self._upload(self.args.output_dir, step, ignore_patterns=["_*", "checkpoint-*"])]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            is_last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            place = "last-checkpoint" if is_last else Path(checkpoint_folder).name
            jobs.append(self._upload(checkpoint_folder, f"{step}, checkpoint", path_in_repo=place))
        self.push_in_progress = PushInProgress(jobs)

    def _upload(self, folder: str, message: str, **kwargs: Any) -> Future:
        job = HfApi(library_name="m2mkd").upload_folder(
            repo_id=self.hub_model_id,
            folder_path=folder,
            commit_message=message,
            token=self.args.hub_token,
            run_as_future=True,
            revision=self.args.hub_revision,
            **kwargs,
        )
        job.add_done_callback(_say_failure)
        return job

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """
        Write `README.md` into `args.output_dir`. Of the arguments of [`~transformers.Trainer`], the card uses only
        `license`, `tags` and `dataset_tags` (Hub ids of the training data).
        """
        if not self.is_world_process_zero():
            return
        evaluations = [entry for entry in self.state.log_history if "eval_loss" in entry]
        card = render_trainer_card(
            self.student.config,
            self.args,
            _method(self.args),
            is_whole=self.args.num_pairs == 1 or self.args.pairs == "all",
            source=self.hub_model_id or self.args.output_dir,
            parameters=self.student.num_parameters(),
            metrics=evaluations[-1] if evaluations else {},
            license=license,
            tags=[*self._tag_names, *_as_list(tags)],
            datasets=_as_list(dataset_tags) or None,
        )
        card.save(Path(self.args.output_dir) / CARD_FILE)

    def trained_pairs(self) -> dict[int, nn.Module]:
        """The stitched stages that this trainer trains, by pair index."""
        return {int(name): pair for name, pair in self.stitched.pairs.items()}


def _method(args: M2MKDConfig) -> str:
    if args.num_pairs > 1:
        indices = ", ".join(map(str, args.pair_indices))
        return f"Of its {args.num_pairs} modules, these were distilled, each on its own: {indices}."
    if args.alpha > 0:
        return "It was trained to match the outputs of a teacher (ordinary distillation)."
    return "It was trained end to end, without a teacher."


logger = logging.get_logger(__name__)


# Written into a checkpoint after all its other files; a process can die between two of them.
COMPLETE_MARKER = "COMPLETE"


def _as_list(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])


def _say_failure(job: Future) -> None:
    # the result of a push in the background is not read anywhere else
    if not job.cancelled() and job.exception() is not None:
        logger.warning(f"A push to the Hub failed; training goes on: {job.exception()}")
