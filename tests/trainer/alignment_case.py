"""A tiny meta model that is aligned with its teacher."""

from pathlib import Path
from typing import Any

from testing_utils import NoiseImages, distillation_args, vit

from m2mkd.distillation.meta_from_teacher import meta_from_teacher
from m2mkd.trainer.alignment_trainer import AlignmentTrainer


TEACHER_DEPTHS, META_DEPTHS = [2, 2, 2], [1, 1, 1]


def alignment_trainer(
    folder: Path, compute_metrics: Any = None, **overrides: Any
) -> tuple[AlignmentTrainer, Any, Any]:
    teacher = vit(seed=2, num_hidden_layers=6)
    meta = meta_from_teacher(teacher, TEACHER_DEPTHS, META_DEPTHS)
    settings = {"student_depths": META_DEPTHS, "teacher_depths": None, "meta_depths": TEACHER_DEPTHS}
    args = distillation_args(folder, **settings, stitch="none", alpha=0.0, **overrides)
    given = {"train_dataset": NoiseImages(), "compute_metrics": compute_metrics}
    return AlignmentTrainer(meta, args, teacher=teacher, **given), meta, teacher
