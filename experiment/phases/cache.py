"""The teacher's hidden states and logits for a training set, stored once for all arms and seeds."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from m2mkd.distillation.target_cache import write_targets
from m2mkd.experiment.artifact import TRAIN_RESULTS
from m2mkd.experiment.flops import forward_flops_per_image
from m2mkd.experiment.machine import peak_memory, reset_peak_memory
from m2mkd.experiment.phases.phase import Phase
from m2mkd.experiment.session import Session
from m2mkd.files import write_folder, write_json
from m2mkd.trainer.m2mkd_trainer import compute_dtype


if TYPE_CHECKING:
    from m2mkd.experiment.plan.costs import Costs, PhaseCost


class CachePhase(Phase):
    """
    One pass of the teacher over all views of a training set.

    Args:
        session (`Session`)
        name_of_data (`str`): The training set.
    """

    is_shared = True
    reads = ("teacher",)

    def __init__(self, session: Session, name_of_data: str):
        super().__init__(session)
        self._data, self.name = name_of_data, f"cache/{name_of_data}"
        spec = self.recipe.distill
        self._has_boundaries = spec.cache is not None and spec.data == name_of_data
        self.sections = ("distill.cache", "teacher.depths") if self._has_boundaries else ("kd.cache",)

    @property
    def artifacts(self) -> list[Path]:
        """`cache/<data>`."""
        return [self.session.folder.cache(self._data)]

    @property
    def data(self) -> tuple[str, ...]:
        """The training set."""
        return (self._data,)

    def run(self) -> None:
        """Store what the teacher computes; its size is announced first."""
        session, recipe, data, (folder,) = self.session, self.recipe, self._data, self.artifacts
        teacher = session.load_teacher()
        session.check_processors(session.teacher_source(), data)
        dataset = session.data.training_set(data, recipe.seed)
        depths = recipe.teacher.depths if self._has_boundaries else None
        args = session.arguments(folder, {}, {})
        flops = forward_flops_per_image(teacher, dataset[0]["pixel_values"][None])
        views = dataset.config.fixed_views()
        reset_peak_memory()
        start = time.perf_counter()

        def write(temporary: Path) -> None:
            write_targets(
                temporary,
                teacher,
                depths,
                dataset,
                recipe.distill.cache if self._has_boundaries else recipe.kd.cache,
                device=args.device,
                compute_dtype=compute_dtype(args),
                batch_size=args.per_device_eval_batch_size,
                num_workers=args.dataloader_num_workers,
                say=lambda size: session.say(f"{self.name}: {size}"),
            )
            results = {
                "train_seconds": time.perf_counter() - start,
                "train_samples_seen": 0,
                "train_flops": flops * len(dataset) * views,
                "peak_memory": peak_memory(),
                "parameters": 0,
                "images": len(dataset),
                "labels": 0,
                "epochs": views,
            }
            write_json(temporary / TRAIN_RESULTS, results)

        write_folder(folder, write)

    def cost(self, costs: "Costs") -> list["PhaseCost"]:
        """Cost of the teacher's passes."""
        passes = {"num_train_epochs": self.recipe.data[self._data].fixed_views(), "max_steps": -1}
        return [costs.phase(self.name, self._data, passes, costs.frozen(costs.teacher, self._data))]
