"""What a recipe would cost: parameters, FLOPs, memory and steps of every phase, without data, GPUs or training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel

from m2mkd.data.errors import DataError
from m2mkd.data.imagenet_classes import imagenet_classes
from m2mkd.data.known_sets import KNOWN_SETS
from m2mkd.modeling.meta_from_teacher import meta_from_teacher
from m2mkd.modeling.stages import Stage, check_stitchable, count_layers, split_into_stages
from m2mkd.trainer.flops import count_parameters
from m2mkd.trainer.networks import build_config, load_config, take_class_names
from m2mkd.trainer.recipe import NetworkSpec, Recipe, Training
from m2mkd.trainer.run_data import RunData, describe_set
from m2mkd.trainer.step_cost import COUNTED_IMAGES, StageCounter, StepCost, build_on_meta, stitched_pairs, trained_cost


# float32 weights, gradients and the two moments of AdamW
BYTES_A_TRAINED_PARAMETER = 16
# transformers' defaults
_DEFAULTS = {
    "num_train_epochs": 3,
    "max_steps": -1,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "bf16": False,
    "fp16": False,
}
# Of published sets that are not drawn from ImageNet.
CLASSES = {"cifar10": range(10), "cifar100": range(100), "cub-200": range(200)}


@dataclass(frozen=True)
class PhasePlan:
    """
    One phase.

    Args:
        name (`str`)
        parameters (`int`): Trained ones, stitches included.
        frozen (`int`): Parameters of what the images pass through untrained.
        images (`int`): In an epoch.
        epochs (`float`)
        batch (`int`): Images of a step, over all GPUs and accumulation steps.
        flops_per_image (`float`): Forward and backward, multiplications and additions apart.
        memory (`float`): Bytes on each GPU: weights, gradients, AdamW's moments, and the activations of one device
            batch without attention maps, which fused attention does not keep.
    """

    name: str
    parameters: int
    frozen: int
    images: int
    epochs: float
    batch: int
    flops_per_image: float
    memory: float

    @property
    def steps(self) -> int:
        """Updates of the weights."""
        return math.ceil(math.ceil(self.images / self.batch) * self.epochs)

    @property
    def flops(self) -> float:
        """Of the whole phase."""
        return self.flops_per_image * self.images * self.epochs


@dataclass(frozen=True)
class Plan:
    """
    A recipe's phases in the order in which they run, and what each arm adds up to.

    Args:
        name (`str`): The recipe's.
        phases (`list[PhasePlan]`): `pair 0`, `pair 1`, … are each alone in a process of its own; `pairs` are those
            that the recipe trains together.
        totals (`dict[str, float]`): FLOPs by arm, and of what the arms need beforehand.
        gpus (`int`): That the steps and the memory are for.
        data (`list[str]`): Each data set in a line: its images and classes.
    """

    name: str
    phases: list[PhasePlan]
    totals: dict[str, float]
    gpus: int
    data: list[str] = field(default_factory=list)


def make_plan(recipe: Recipe, gpus: int = 1) -> Plan:
    """
    Plan a recipe. Its networks are built on the meta device, without memory for their weights.

    Args:
        recipe (`Recipe`)
        gpus (`int`, *optional*, defaults to 1): Devices that share each phase.

    Raises:
        `RecipeError` or `StageError`: the networks do not fit the recipe's depths or each other.
        `DataError`: the images of a set can be counted only where they are, and they are not there.
    """
    return _Planner(recipe, gpus).plan()


class _Planner:
    def __init__(self, recipe: Recipe, gpus: int):
        self.recipe, self.gpus, self.data, self.counter = recipe, gpus, RunData(recipe), StageCounter()
        self.depths = recipe.student.depths
        self.meta_depths = recipe.meta.depths or [1] * len(self.depths)
        self.teacher = self._teacher()
        aligned = recipe.meta.init == "from_teacher"
        self.meta = (
            meta_from_teacher(self.teacher, recipe.teacher.depths, self.meta_depths)
            if aligned
            else self._network(recipe.meta.model, recipe.meta.data)
        )

    def plan(self) -> Plan:
        recipe = self.recipe
        student = self._network(recipe.student.model, recipe.distill.data)
        check_stitchable(student.config, self.teacher.config, self.meta.config)
        beforehand = [*self._meta(), *self._trained_teacher()]
        if recipe.meta.init == "from_teacher":
            beforehand.reverse()
        pairs, arms = self._pairs() if "m2mkd" in recipe.arms else [], self._arms()
        flops = {phase.name: phase.flops for phase in [*beforehand, *pairs, *arms]}
        trained = sum(phase.flops for phase in beforehand)
        # an incubated teacher needs the meta model, too
        own = [phase for phase in beforehand if recipe.meta.init == "random" or phase.name != "meta"]
        teacher = sum(phase.flops for phase in own) if recipe.teacher.pretrained is None else 0.0
        totals = {arm: flops[f"arm {arm}"] for arm in ("e2e", "kd") if arm in recipe.arms}
        if "m2mkd" in recipe.arms:
            totals["m2mkd"] = flops["pairs"] + flops["arm m2mkd"]
        for arm, extra, what in (("kd", teacher, "teacher"), ("m2mkd", trained, "meta model and teacher")):
            if arm in totals and extra:
                totals[f"{arm}, {what} included"] = totals[arm] + extra
        if recipe.equal_compute and "m2mkd" in totals:
            arms += [_with_flops(phase, totals["m2mkd"]) for phase in arms if phase.name != "arm m2mkd"]
        return Plan(recipe.name, [*beforehand, *pairs, *arms], totals, self.gpus, self._sets())

    # ---- Networks and data ----

    def _published(self, name: str) -> tuple[int | None, list[str]] | None:
        """Images (if their number is published) and classes of a published set; `None` for any other set."""
        config = self.data.config(name)
        source = config.source.partition(":")[0]
        known = KNOWN_SETS.get(source)
        if known is None or config.partial:
            return None
        split = config.split or (next(iter(known.splits)) if len(known.splits) == 1 else None)
        if split not in known.splits:
            raise DataError(
                f"data.{name}: {source} has no split {config.split!r}: set split to "
                f"{' or '.join(map(repr, known.splits))}"
            )
        _, images = known.splits[split]
        classes = imagenet_classes(*known.marks) if known.marks is not None else CLASSES[source]
        if config.samples_per_class is not None:
            images = config.samples_per_class * len(classes)
        return images, [str(name) for name in classes]

    def _size(self, name: str) -> tuple[int, list[str]]:
        """Images of an epoch of a training set, and the names of its classes."""
        published = self._published(name)
        if published is None:
            return len(self.data.training_set(name, seed=0)), self.data.class_names(name)
        images, classes = published
        if images is None:
            raise DataError(f"data.{name}: the number of its images is not published, so it is no training set")
        return images, classes

    def _sets(self) -> list[str]:
        """A line for each set that the recipe uses."""
        sizes = {name: self._published(name) or self.data.size(name) for name in self.recipe.used_data()}
        return [describe_set(name, *size) for name, size in sizes.items()]

    def _network(self, spec: NetworkSpec, data: str) -> PreTrainedModel:
        return build_on_meta(build_config(spec, self.data.config(data), self._size(data)[1]))

    def _teacher(self) -> PreTrainedModel:
        spec = self.recipe.teacher
        if spec.model is not None:
            return self._network(spec.model, spec.data)
        config = load_config(spec.pretrained)
        config.image_size = self.data.config(self.recipe.distill.data).image_size
        take_class_names(config, self._size(self.recipe.distill.data)[1])
        return build_on_meta(config)

    # ---- Phases ----

    def _meta(self) -> list[PhasePlan]:
        spec = self.recipe.meta
        if not {"m2mkd", "kd"} & set(self.recipe.arms):
            return []
        if spec.init == "random":
            return [self._phase("meta", spec.data, spec.training, self._whole(self.meta, spec.data))]
        if "m2mkd" not in self.recipe.arms:
            return []
        return [self._phase("meta", spec.data, spec.training, self._aligned(spec.data))]

    def _trained_teacher(self) -> list[PhasePlan]:
        spec = self.recipe.teacher
        if spec.model is None or not {"m2mkd", "kd"} & set(self.recipe.arms):
            return []
        whole = self._whole(self.teacher, spec.data)
        if self.recipe.meta.init == "from_teacher":
            return [self._phase("teacher", spec.data, spec.finetuning, whole)]
        pairs = self._pair_steps(self.teacher, spec.depths, spec.data, teacher=None, stitch="none")
        incubation = self._together(pairs, range(len(pairs)), spec.data)
        return [
            self._phase("teacher: incubation", spec.data, spec.incubation, incubation),
            self._phase("teacher: fine-tuning", spec.data, spec.finetuning, whole),
        ]

    def _pairs(self) -> list[PhasePlan]:
        spec, indices = self.recipe.distill, range(len(self.depths))
        student = self._network(self.recipe.student.model, spec.data)
        names = ("stitch", "nac_codes", "read_in_latents")
        options = {name: spec.training[name] for name in names if name in spec.training}
        teacher = self.teacher if spec.training.get("alpha", 1) > 0 else None
        steps = self._pair_steps(student, self.depths, spec.data, teacher, **options)
        ways = [(f"pair {index}", [index]) for index in indices] + [("pairs", list(indices))]
        return [
            self._phase(name, spec.data, spec.training, self._together(steps, chosen, spec.data))
            for name, chosen in ways
        ]

    def _arms(self) -> list[PhasePlan]:
        spec = self.recipe.finetune
        student = self._network(self.recipe.student.model, spec.data)
        plain, arms = self._whole(student, spec.data), []
        for arm in self.recipe.arms:
            step, training = plain, spec.training
            if arm == "kd":
                whole = split_into_stages(self.teacher, [count_layers(self.teacher)])
                step = plain + self._frozen(whole, spec.data)[-1]
                training = {**training, **self.recipe.kd.training}
            arms.append(self._phase(f"arm {arm}", spec.data, training, step))
        return arms

    def _phase(self, name: str, data: str, training: Training, step: StepCost) -> PhasePlan:
        training = {**_DEFAULTS, **self.recipe.training, **training}
        half = training["bf16"] or training["fp16"]
        device_batch = training["per_device_train_batch_size"]
        images, _ = self._size(data)
        batch = device_batch * training["gradient_accumulation_steps"] * self.gpus
        epochs = training["num_train_epochs"]
        if training["max_steps"] > 0:
            epochs = training["max_steps"] / math.ceil(images / batch)
        weights = step.parameters * BYTES_A_TRAINED_PARAMETER + step.frozen * (2 if half else 4)
        memory = weights + step.saved * device_batch / (2 if half else 1)
        return PhasePlan(name, step.parameters, step.frozen, images, epochs, batch, step.flops, memory)

    # ---- Steps: what M2MKDTrainer and AlignmentTrainer do with one image ----

    def _images(self, data: str) -> tuple[int, ...]:
        size = self.data.config(data).image_size
        return (COUNTED_IMAGES, 3, size, size)

    def _whole(self, network: PreTrainedModel, data: str) -> StepCost:
        """A network that is trained end to end."""
        (stage,) = split_into_stages(network, [count_layers(network)])
        return trained_cost(
            stitched_pairs(network, [stage], network.config.hidden_size, "none")[0], self._images(data)
        )[0]

    def _frozen(self, stages: Sequence[Stage], data: str) -> list[StepCost]:
        """A chain of stages without gradient: what it takes up to each."""
        steps, shape = [StepCost()], self._images(data)
        for stage in stages:
            step, shape = self.counter.forward(stage, shape)
            steps.append(steps[-1] + step)
        return steps[1:]

    def _aligned(self, data: str) -> StepCost:
        """The layers of a meta model on the boundaries of the teacher's stages."""
        theirs = split_into_stages(self.teacher, self.recipe.teacher.depths)
        own = split_into_stages(self.meta, self.meta_depths)
        total, shape = self._frozen(theirs, data)[-1], self._images(data)
        for pair, source in zip(
            stitched_pairs(self.meta, own, self.meta.config.hidden_size, "none"), theirs, strict=True
        ):
            total += trained_cost(pair, shape, layers_only=True)[0]
            shape = self.counter.forward(source, shape)[1]
        return total

    def _pair_steps(
        self,
        student: PreTrainedModel,
        depths: Sequence[int],
        data: str,
        teacher: PreTrainedModel | None,
        stitch: str | None = None,
        **options: Any,
    ) -> list[StepCost]:
        """Each pair on the meta model's hidden states, which the prefix gives; its teacher and suffix included."""
        meta = split_into_stages(self.meta, self.meta_depths)
        theirs = split_into_stages(teacher, self.recipe.teacher.depths) if teacher is not None else []
        stages, shape, steps = split_into_stages(student, depths), self._images(data), []
        pairs = stitched_pairs(
            student, stages, self.meta.config.hidden_size, stitch if len(stages) > 1 else "none", **options
        )
        for index, pair in enumerate(pairs):
            step, ours = trained_cost(pair, shape)
            for stage in meta[index + 1 :]:
                suffix, ours = self.counter.passed(stage, ours)
                step += suffix
            if theirs:
                own, states = self.counter.forward(theirs[index], shape)
                step += own
                for stage in meta[index + 1 :]:
                    suffix, states = self.counter.forward(stage, states)
                    step += replace(suffix, frozen=0)
            # the meta model is counted once, where the pairs come together
            steps.append(replace(step, frozen=count_parameters(theirs[index]) if theirs else 0))
            shape = self.counter.forward(meta[index], shape)[1]
        return steps

    def _together(self, steps: Sequence[StepCost], indices: Sequence[int], data: str) -> StepCost:
        """Pairs in one process, with one pass through the meta model up to the last of them."""
        meta = split_into_stages(self.meta, self.meta_depths)
        prefix = [StepCost(), *self._frozen(meta, data)][max(indices)]
        total = replace(prefix, frozen=count_parameters(self.meta))
        for index in indices:
            total += steps[index]
        return total


def _with_flops(phase: PhasePlan, flops: float) -> PhasePlan:
    """A baseline once more, with as many epochs as take these FLOPs; rounded up, as the runner does."""
    epochs = math.ceil(flops / (phase.flops_per_image * phase.images))
    return replace(phase, name=f"{phase.name}_equal_compute", epochs=max(epochs, phase.epochs))
