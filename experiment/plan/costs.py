"""Counts the steps of a recipe's phases on the meta device: no data, no GPU, no training."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from typing import Any

import torch
from transformers import PreTrainedModel

from m2mkd.data.known_sets import known_set, published_split
from m2mkd.distillation.sizes import num_special_tokens, vision_config
from m2mkd.distillation.split import count_layers, split_into_stages
from m2mkd.distillation.stage import Stage
from m2mkd.errors import DataError
from m2mkd.experiment.flops import count_parameters
from m2mkd.experiment.plan.step_cost import (
    COUNTED_IMAGES,
    StageCounter,
    StepCost,
    stitched_pairs,
    trained_cost,
)
from m2mkd.experiment.recipe import NetworkSpec, Recipe
from m2mkd.experiment.recipe_networks import RecipeNetworks, class_names_without_images
from m2mkd.experiment.run_data import RunData, describe_set
from m2mkd.experiment.section import Training
from m2mkd.trainer.m2mkd_config import M2MKDConfig


# float32 weights, gradients and the two moments of AdamW
BYTES_A_TRAINED_PARAMETER = 16
_DEFAULTS = {field.name: field.default for field in fields(M2MKDConfig)}


@dataclass(frozen=True)
class PhaseCost:
    """
    One phase, or a part of one.

    Args:
        name (`str`)
        parameters (`int`): Number of trained parameters, including stitches.
        frozen (`int`): Number of parameters that the images pass through without being trained.
        images (`int`): Images per epoch.
        epochs (`float`)
        batch (`int`): Images per step, over all GPUs and accumulation steps.
        flops_per_image (`float`): Forward and backward; multiplications and additions count separately.
        device_batch (`int`): Images at once on each device.
        weights (`float`): Bytes on each device of weights, gradients and AdamW's moments.
        activations (`float`): Bytes that one image takes, without attention maps, which fused attention does not keep.
    """

    name: str
    parameters: int
    frozen: int
    images: int
    epochs: float
    batch: int
    flops_per_image: float
    device_batch: int
    weights: float
    activations: float

    @property
    def memory(self) -> float:
        """Bytes on each device at the peak."""
        return self.weights + self.activations * self.device_batch

    def largest_batch(self, memory: float) -> int:
        """Number of images that fit at once into the bytes of a device."""
        return max(0, math.floor((memory - self.weights) / self.activations))

    @property
    def steps(self) -> int:
        """Number of updates of the weights."""
        return math.ceil(math.ceil(self.images / self.batch) * self.epochs)

    @property
    def flops(self) -> float:
        """FLOPs of the whole phase."""
        return self.flops_per_image * self.images * self.epochs

    def with_flops(self, flops: float) -> "PhaseCost":
        """Copy of the phase with as many epochs as the FLOPs allow, rounded up, but no fewer than it has."""
        epochs = math.ceil(flops / (self.flops_per_image * self.images))
        return replace(self, epochs=max(epochs, self.epochs))


class Costs:
    """
    The networks of a recipe without weights, and the cost of steps through them.

    Args:
        recipe (`Recipe`)
        gpus (`int`): Devices that share each phase.
    """

    def __init__(self, recipe: Recipe, gpus: int):
        self.recipe, self.gpus, self.data, self._counter = recipe, gpus, RunData(recipe), StageCounter()
        # first, so that a missing set is reported before networks that do not fit it
        self.sets = self._describe_sets()
        self._networks = RecipeNetworks(recipe, partial(class_names_without_images, self.data))
        self._meta_depths = self._networks.meta_depths
        self.teacher, self.meta = self._networks.teacher, self._networks.meta

    # ---- Networks and data ----

    def network(self, spec: NetworkSpec, data: str) -> PreTrainedModel:
        """Build a network of the recipe for a data set."""
        return self._networks.build(spec, data)

    @cache  # noqa: B019 - a plan is short-lived
    def _size(self, name: str) -> int:
        """Images per epoch of a training set."""
        published = self._published(name)
        if published is None:
            return len(self.data.training_set(name, seed=0))
        images, _ = published
        if images is None:
            raise DataError(f"data.{name}: the number of its images is not published, so it cannot be a training set")
        return images

    def _published(self, name: str) -> tuple[int | None, list[str]] | None:
        """Images (if their number is published) and classes of a published set; `None` for any other set."""
        config = self.data.config(name)
        if known_set(config.source) is None or config.partial:
            return None
        try:
            _, _, images = published_split(config)
        except DataError as error:
            raise DataError(f"data.{name}: {error}") from error
        classes = class_names_without_images(self.data, name)
        if config.samples_per_class is not None:
            images = config.samples_per_class * len(classes)
        return images, classes

    def _describe_sets(self) -> list[str]:
        """Describe each set that the recipe uses in one line."""
        sizes = {name: self._published(name) or self.data.size(name) for name in self.recipe.used_data()}
        return [describe_set(name, *size) for name, size in sizes.items()]

    # ---- Phases ----

    def phase(self, name: str, data: str, training: Training, step: StepCost) -> PhaseCost:
        """Compute the cost of a phase from the cost per image, `step`."""
        training = {**_DEFAULTS, **self.recipe.training, **training}
        half = training["bf16"] or training["fp16"]
        device_batch = training["per_device_train_batch_size"]
        images = self._size(data)
        batch = device_batch * training["gradient_accumulation_steps"] * self.gpus
        epochs = training["num_train_epochs"]
        if training["max_steps"] > 0:
            epochs = training["max_steps"] / math.ceil(images / batch)
        weights = step.parameters * BYTES_A_TRAINED_PARAMETER + step.frozen * (2 if half else 4)
        activations = step.saved / (2 if half else 1)
        return PhaseCost(
            *(name, step.parameters, step.frozen, images, epochs, batch, step.flops),
            *(device_batch, weights, activations),
        )

    # ---- Steps: what M2MKDTrainer and AlignmentTrainer do with one image ----

    def _images(self, data: str) -> tuple[int, ...]:
        size = self.data.config(data).image_size
        return (COUNTED_IMAGES, 3, size, size)

    def whole(self, network: PreTrainedModel, data: str) -> StepCost:
        """Cost per image of a network that is trained end to end."""
        (stage,) = split_into_stages(network, [count_layers(network)])
        (pair,) = stitched_pairs(network, [stage], vision_config(network.config).hidden_size, "none")
        return trained_cost(pair, self._images(data))[0]

    def frozen(self, network: PreTrainedModel, data: str) -> StepCost:
        """Cost per image of a pass through a network without gradient."""
        return self._chain(split_into_stages(network, [count_layers(network)]), data)[-1]

    def _chain(self, stages: Sequence[Stage], data: str) -> list[StepCost]:
        """Cost per image of a chain of stages without gradient, up to and including each stage."""
        steps, shape = [StepCost()], self._images(data)
        for stage in stages:
            step, shape = self._counter.forward(stage, shape)
            steps.append(steps[-1] + step)
        return steps[1:]

    def aligned(self, data: str) -> StepCost:
        """Cost per image of the meta model's layers on the boundaries of the teacher's stages."""
        theirs = split_into_stages(self.teacher, self.recipe.teacher.depths)
        own = split_into_stages(self.meta, self._meta_depths)
        total, shape = self._chain(theirs, data)[-1], self._images(data)
        pairs = stitched_pairs(self.meta, own, vision_config(self.meta.config).hidden_size, "none")
        for pair, source in zip(pairs, theirs, strict=True):
            total += trained_cost(pair, shape, layers_only=True)[0]
            shape = self._counter.forward(source, shape)[1]
        return total

    def pairs(
        self,
        student: PreTrainedModel,
        depths: Sequence[int],
        data: str,
        teacher: PreTrainedModel | None,
        context: PreTrainedModel | None = None,
        match: str = "logits",
        feed: str = "teacher",
        stitch: str | None = None,
        **options: Any,
    ) -> "PairCosts":
        """
        Cost per image of the pairs inside `context` (`None`: the meta model), which may be the teacher itself; the
        other arguments are those of the trainer.
        """
        around = context or self.meta
        theirs = split_into_stages(teacher, self.recipe.teacher.depths) if teacher is not None else []
        frozen = theirs if context is teacher and theirs else split_into_stages(around, self._meta_depths)
        stages, shape, own_shape = split_into_stages(student, depths), self._images(data), self._images(data)
        options["special_tokens"] = num_special_tokens(around.config)
        stitch = stitch if len(stages) > 1 else "none"
        pairs = stitched_pairs(student, stages, vision_config(around.config).hidden_size, stitch, feed=feed, **options)
        own = []
        for index, pair in enumerate(pairs):
            suffix = frozen[index + 1 :] if match == "logits" else []
            step, ours = trained_cost(pair, own_shape if feed == "student" else shape)
            step += self._through(suffix, ours, self._counter.passed)
            if theirs and frozen is not theirs:
                target, states = self._counter.forward(theirs[index], shape)
                step += target + self._through(suffix, states, self._counter.forward)
            # the context is counted once, in `together`
            is_other = bool(theirs) and frozen is not theirs
            own.append(replace(step, frozen=count_parameters(theirs[index]) if is_other else 0))
            own_shape = pair.run(torch.empty(own_shape if feed == "student" else shape, device="meta"))[0].shape
            shape = self._counter.forward(frozen[index], shape)[1]
        chain = [StepCost(), *self._chain(frozen, data)]
        if frozen is theirs:
            chain = chain[1:] if match == "boundary" else chain[-1:] * len(frozen)
        whole = None if frozen is theirs and match == "boundary" else count_parameters(around)
        return PairCosts(own, [step if whole is None else replace(step, frozen=whole) for step in chain])

    def _through(self, stages: Sequence[Stage], shape: Sequence[int], count: Callable[..., Any]) -> StepCost:
        total = StepCost()
        for stage in stages:
            step, shape = count(stage, shape)
            total += step
        return total


@dataclass(frozen=True)
class PairCosts:
    """
    Cost per image of pairs.

    Args:
        own (`list[StepCost]`): Each pair, with what only it needs.
        shared (`list[StepCost]`): The passes that the pairs up to an index share.
    """

    own: list[StepCost]
    shared: list[StepCost]

    def without_context(self) -> "PairCosts":
        """The same pairs with stored targets: nothing passes through the network around them."""
        return PairCosts(self.own, [StepCost()] * len(self.shared))

    def together(self, indices: Sequence[int] | None = None) -> StepCost:
        """Cost per image of some pairs (`None`: all) in one process."""
        chosen = range(len(self.own)) if indices is None else indices
        return sum((self.own[index] for index in chosen), start=self.shared[max(chosen)])
