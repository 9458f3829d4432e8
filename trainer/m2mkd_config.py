"""Arguments of [`M2MKDTrainer`]."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments


@dataclass
class M2MKDConfig(TrainingArguments):
    r"""
    Arguments of module-to-module distillation (m2mKD, arXiv 2402.16918), in addition to those of
    [`~transformers.TrainingArguments`].

    > Parameters that split the networks

    Args:
        student_depths (`list[int]`, *optional*):
            Number of layers in each student stage. `None`: the whole student is one stage, which makes this ordinary
            distillation (or, with `alpha=0`, ordinary training).
        teacher_depths (`list[int]`, *optional*):
            Number of layers in each teacher stage, with as many stages as the student has. `None`: one stage.
        meta_depths (`list[int]`, *optional*):
            Number of layers in each stage of the meta model. `None`: one layer per stage, as in the paper.
        pairs (`list[int]` or `"all"`, *optional*, defaults to `"all"`):
            Pairs to train in this process, counted from 0. The pairs share no parameters, so training them all at once
            (with a single pass through the meta model) or one after the other gives the same weights.
        stitch (`str`, *optional*):
            Layers between the widths of student and meta model: `"layernorm_linear"` (in the paper for V-MoE),
            `"linear"` (in the paper for NAC) or `"none"`. `None`: the paper's choice for the student.
        nac_codes (`str`, *optional*, defaults to `"random"`):
            Replacement for the codes of a NAC's latents, which do not exist between layers of the meta model:
            `"random"`, one fixed random code per pair (as in the paper), or `"own"`, the initial codes of the
            student's latents.
        read_in_latents (`str`, *optional*, defaults to `"one"`):
            Tokens that the read-in of a NAC passes to the meta model: `"one"` (as in the paper) or `"all"`, one per
            input latent.

    > Parameters of the context

    Args:
        context (`str`, *optional*, defaults to `"meta"`):
            Network whose frozen layers surround the pairs: `"meta"` (as in the paper), or `"teacher"`: a pair gets the
            teacher's own hidden states before its stage, so no meta model is needed.
        match (`str`, *optional*, defaults to `"logits"`):
            What a pair has to match: `"logits"`, those of the context with the teacher's stage in it (as in the
            paper), or `"boundary"`, the hidden states behind the teacher's stage; for the last pair the logits. With
            `context="teacher"` and `match="boundary"`, one pass through the teacher serves all pairs, and a step costs
            as much as one of ordinary distillation. The read-in of a NAC returns fewer tokens than the teacher; its
            targets are the class token and means of consecutive patches.
        feed (`str`, *optional*, defaults to `"teacher"`):
            Input of a pair: `"teacher"`, the hidden states of the context, or `"student"`, the output of the student's
            stage before it, without gradient. With `"student"`, the stages form the whole student, without stitches
            between them, but a pair needs all pairs before it in the same process.
        stitch_init (`str`, *optional*, defaults to `"random"`):
            How the stitches behind the stages start: `"random"`, or `"least_squares"`, the linear maps from the
            outputs of the untrained stages to those of the teacher's stages, fitted on 256 training images.

    > Parameters of the loss

    Args:
        distillation_type (`str`, *optional*, defaults to `"soft"`):
            `"soft"`: divergence from the teacher's distribution. `"hard"`: cross entropy with its most likely class.
        alpha (`float`, *optional*, defaults to 0.5):
            Weight of the teacher in the loss, from 0 (no teacher is needed) to 1.
        temperature (`float`, *optional*, defaults to 1.0):
            Temperature that softens both distributions; tau in the paper.
        kl_reduction (`str`, *optional*, defaults to `"batchmean"`):
            `"batchmean"` averages the divergence over the images. `"mean"` averages over images times classes, as the
            official code does, so the divergence is divided by the number of classes.

    > Parameters of the optimizer

    Args:
        base_learning_rate (`float`, *optional*):
            Learning rate for 512 images per step. It replaces `learning_rate`, which becomes `base_learning_rate *
            images per step / 512`, counted over all devices and accumulation steps (the paper's rule).

    > [!NOTE]
    > Defaults that differ from `TrainingArguments`: `remove_unused_columns` and `ddp_find_unused_parameters` are
    > `False` (every trained parameter is used in every step), and `logging_nan_inf_filter` is `False` (a non-finite
    > loss stops the run).

    Raises:
        `ValueError`: a value is out of range.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = TrainingArguments._VALID_DICT_FIELDS

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Whether to remove columns that the model's forward does not accept."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Whether to leave non-finite losses out of the logs."}
    )

    # Parameters that split the networks
    student_depths: list[int] | None = field(
        default=None, metadata={"help": "Layers in each student stage; None: the whole student is one stage."}
    )
    teacher_depths: list[int] | None = field(
        default=None, metadata={"help": "Layers in each teacher stage; None: the whole teacher is one stage."}
    )
    meta_depths: list[int] | None = field(
        default=None, metadata={"help": "Layers in each stage of the meta model; None: one layer per stage."}
    )
    pairs: list[int] | str = field(
        default="all", metadata={"help": "Pairs to train in this process, counted from 0, or 'all'."}
    )
    stitch: str | None = field(
        default=None,
        metadata={"help": "Layers between student and meta width: 'layernorm_linear', 'linear' or 'none'."},
    )
    nac_codes: str = field(
        default="random", metadata={"help": "Codes of a NAC's distilled modules: 'random' (one per pair) or 'own'."}
    )
    read_in_latents: str = field(
        default="one", metadata={"help": "Tokens that a NAC's read-in passes to the meta model: 'one' or 'all'."}
    )

    # Parameters of the context
    context: str = field(default="meta", metadata={"help": "Frozen network around the pairs: 'meta' or 'teacher'."})
    match: str = field(
        default="logits",
        metadata={"help": "What a pair has to match: 'logits' or 'boundary' (of the teacher's stage)."},
    )
    feed: str = field(
        default="teacher",
        metadata={"help": "Input of a pair: 'teacher' (the context) or 'student' (the stage before it)."},
    )
    stitch_init: str = field(
        default="random", metadata={"help": "How the stitches behind the stages start: 'random' or 'least_squares'."}
    )

    # Parameters of the loss
    distillation_type: str = field(
        default="soft", metadata={"help": "'soft' (divergence) or 'hard' (the teacher's most likely class)."}
    )
    alpha: float = field(default=0.5, metadata={"help": "Weight of the teacher in the loss, from 0 to 1."})
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature that softens both distributions; tau in the paper."}
    )
    kl_reduction: str = field(
        default="batchmean",
        metadata={"help": "'batchmean' (over images) or 'mean' (over images times classes, as in the official code)."},
    )

    # Parameters of the optimizer
    base_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate for 512 images per step; it is scaled and replaces `learning_rate`."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base_learning_rate is not None:
            if not 0 <= self.base_learning_rate < math.inf:
                raise ValueError(
                    f"`base_learning_rate` must be finite and not negative, but is {self.base_learning_rate}."
                )
            images = self.train_batch_size * self.gradient_accumulation_steps * self.world_size
            self.learning_rate = self.base_learning_rate * images / 512
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False
        _check_choice("distillation_type", self.distillation_type, ("soft", "hard"))
        _check_choice("kl_reduction", self.kl_reduction, ("batchmean", "mean"))
        if self.stitch is not None:
            _check_choice("stitch", self.stitch, ("layernorm_linear", "linear", "none"))
        _check_choice("nac_codes", self.nac_codes, ("random", "own"))
        _check_choice("context", self.context, ("meta", "teacher"))
        _check_choice("match", self.match, ("logits", "boundary"))
        _check_choice("feed", self.feed, ("teacher", "student"))
        _check_choice("stitch_init", self.stitch_init, ("random", "least_squares"))
        _check_choice("read_in_latents", self.read_in_latents, ("one", "all"))
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"`alpha`, the weight of the teacher, must be in [0, 1], but is {self.alpha}.")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"`temperature` must be positive and finite, but is {self.temperature}.")
        self._check_depths()

    def _check_depths(self) -> None:
        for name in ("teacher_depths", "meta_depths"):
            depths = getattr(self, name)
            if depths is not None and len(depths) != self.num_pairs:
                raise ValueError(
                    f"`student_depths` {self.student_depths} makes {self.num_pairs} stages, but `{name}` {depths} "
                    f"makes {len(depths)}. Pair i takes stage i of each network, so give each the same number of "
                    "stages."
                )
        if self.pairs != "all":
            wrong = not isinstance(self.pairs, list) or not self.pairs or len(set(self.pairs)) != len(self.pairs)
            if wrong or any(not 0 <= pair < self.num_pairs for pair in self.pairs):
                raise ValueError(
                    f"`pairs` must be 'all' or different indices from 0 to {self.num_pairs - 1}, but is {self.pairs}."
                )
        check_feed(self.feed, self.pair_indices)

    @property
    def num_pairs(self) -> int:
        """Number of pairs that the networks are split into."""
        return len(self.student_depths) if self.student_depths is not None else 1

    @property
    def uses_teacher(self) -> bool:
        """Whether the teacher gives inputs or targets."""
        is_needed_by_pairs = self.context == "teacher" or self.match == "boundary"
        return self.alpha > 0 or (self.num_pairs > 1 and is_needed_by_pairs)

    @property
    def pair_indices(self) -> list[int]:
        """Indices of the pairs that this process trains, in order."""
        return list(range(self.num_pairs)) if self.pairs == "all" else sorted(self.pairs)


def check_feed(feed: str, pairs: list[int]) -> None:
    """Raise `ValueError` if pairs that are fed by the student are trained without those before them."""
    missing = sorted(set(range(max(pairs))) - set(pairs))
    if feed == "student" and missing:
        raise ValueError(
            f"`feed` is 'student', so pair {max(pairs)} needs the output of the pairs {list(range(max(pairs)))} in "
            f"the same process, but `pairs` is {pairs}. Set `pairs` to {list(range(max(pairs) + 1))}, or `feed` to "
            "'teacher'."
        )


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}, but is {value!r}.")
