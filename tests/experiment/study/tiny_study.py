"""A study of the tiny recipe."""

from pathlib import Path

import yaml
from tiny_run import recipe_content


EPOCHS = "finetune.training.num_train_epochs"


def write_study(folder: Path, **changes) -> Path:
    """A study of the tiny recipe: two budgets of kd, and one of kd after modules in the teacher's context."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_content(folder)))
    distill = {"distill.context": "teacher", "distill.match": "boundary", "distill.training.num_train_epochs": 1}
    content = {
        "name": "tiny study",
        "output_dir": str(folder / "study"),
        "recipe": "recipe.yaml",
        "seeds": [0, 1],
        "set": {"distill.training.alpha": 1.0, "finetune.data": "train", "training.num_train_epochs": 1},
        "curves": {
            "kd": {"arm": "kd", "grid": {EPOCHS: [1, 4]}},
            "after_modules": {"arm": "m2mkd_kd", "set": distill, "points": [{EPOCHS: 1}, {EPOCHS: 2}]},
        },
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
    return path
