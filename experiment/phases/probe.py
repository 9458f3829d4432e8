"""A pretrained backbone under a new linear head, which is fitted to the labels."""

import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from m2mkd.distillation.load import load_with_new_head
from m2mkd.distillation.split import stage_class
from m2mkd.evaluation.probe import fit_probe
from m2mkd.experiment.flops import count_parameters, forward_flops_per_image
from m2mkd.experiment.machine import peak_memory, reset_peak_memory
from m2mkd.experiment.networks import fit_to_data
from m2mkd.experiment.phases.teacher import TrainedTeacherPhase, describe_network
from m2mkd.experiment.plan.step_cost import StepCost
from m2mkd.experiment.section import Training


if TYPE_CHECKING:
    from m2mkd.experiment.plan.costs import Costs, PhaseCost


# Images that a head is fitted to, spread evenly over a larger set: their features are in memory.
MAX_IMAGES = 50_000


class ProbedTeacherPhase(TrainedTeacherPhase):
    """A teacher whose backbone is published and whose head is fitted here: a linear probe."""

    def training_arguments(self) -> dict[str, Training]:
        """None: the fit has no training arguments."""
        return {}

    def run(self) -> None:
        """Compute the features once, fit the head, and save the whole network."""
        session, spec = self.session, self.recipe.teacher
        class_names = session.data.class_names(spec.data)
        session.check_processors(spec.pretrained, spec.data, any_size=True)
        model = load_with_new_head(spec.pretrained, class_names)
        fit_to_data(model, session.data.config(spec.data), class_names)
        images = session.data.plain_set(spec.data, MAX_IMAGES)
        flops = forward_flops_per_image(model, images[0]["pixel_values"][None]) * len(images)
        if torch.accelerator.is_available():
            model.to(torch.accelerator.current_accelerator())
        reset_peak_memory()
        start = time.perf_counter()
        probe = fit_probe(model, images, session.eval_batch_size(), session.screen)
        session.say(
            f"teacher: linear probe on {len(images)} images, weight decay {probe.weight_decay:g} "
            f"({100 * probe.held_out_accuracy:.1f} % of those held out to choose it)"
        )
        results = {
            "train_seconds": time.perf_counter() - start,
            "train_samples_seen": len(images),
            "train_flops": flops + probe.flops,
            "peak_memory": peak_memory(),
            "images": len(images),
            "labels": len(images),
            "epochs": 1.0,
            "log_history": [],
            "network": describe_network(model, spec.pretrained),
            "probe": asdict(probe),
        }
        session.save_model(session.folder.teacher, model, spec.data, results)

    def cost(self, costs: "Costs") -> list["PhaseCost"]:
        """Cost of one pass of the training images through the network; the fit to its features takes next to none."""
        data = self.recipe.teacher.data
        heads = stage_class(type(costs.teacher)).classifiers_of(costs.teacher)
        step = costs.frozen(costs.teacher, data) + StepCost(parameters=sum(map(count_parameters, heads)))
        return [costs.phase("teacher: linear probe", data, {"num_train_epochs": 1, "max_steps": -1}, step)]
